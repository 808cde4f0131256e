"""How much of the code one has to know: files, storeys, and what a round and a step pass."""

from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message

from common.config import HypernetSection, UpdateSection
from server_app.aggregation import make_network, make_rule
from server_app.hypernet.groups import Update
from tests.support.house import (
    PACKAGES,
    Trace,
    import_graph,
    listed,
    name_of,
    sources,
    tallest,
    traced,
)
from tests.support.tiny import Handler, Wrapped, run_tiny, tiny_config

MOST_LINES = 300
MOST_SERVER_FILES = 28
MOST_STOREYS = 7
MOST_FILES_OF_A_ROUND = 25
MOST_FILES_OF_A_STEP = 5


def test_no_file_is_too_long() -> None:
    lengths = {
        name_of(path): len(path.read_text().splitlines())
        for package in PACKAGES
        for path in sources(package)
    }
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_imports_run_in_circles(package: str) -> None:
    tallest(import_graph(package))


def test_the_server_is_small_and_low() -> None:
    chain = tallest(import_graph("server_app"))
    assert len(chain) <= MOST_STOREYS, " -> ".join(chain)
    files = [name_of(path) for path in sources("server_app")]
    assert len(files) <= MOST_SERVER_FILES, listed(files)


@pytest.mark.parametrize("method", ["mh-pfedhn", "mh-pfedhn-gd", "fedavg"])
def test_a_round_passes_few_files(tmp_path: Path, method: str) -> None:
    """From the first training message of round 2 to the first of round 3, no checkpoint between."""
    trace = Trace()

    def handle(message: Message, context: Context, handler: Handler) -> Message:
        if message.metadata.message_type.startswith("train"):
            server_round = message.content["config"]["server-round"]
            if server_round == 2:
                trace.__enter__()
            elif server_round == 3:
                trace.__exit__(None, None, None)
        return handler(message, context)

    settings = {"server_rule": "kernel", "checkpoint_every": 3}
    config = tiny_config(tmp_path, method=method, rounds=3, **settings)
    run_tiny(config, app=Wrapped(handle))
    found = trace.functions()
    assert len(found) <= MOST_FILES_OF_A_ROUND, listed(found)


@pytest.mark.parametrize("rule", ["adam", "kernel"])
def test_a_server_step_passes_few_files(rule: str) -> None:
    hypernet = make_network(rule, HypernetSection(chunk_size=10), seed=0)
    for client_id, size in {"a": 27, "b": 30}.items():
        hypernet.add_client(client_id, size)
    step = make_rule(hypernet, UpdateSection(server_rule=rule), total_rounds=5).step
    updates = [Update("a", torch.ones(27)), Update("b", torch.ones(30))]
    found = traced(lambda: step(updates, progress=0.0))
    assert len(found) <= MOST_FILES_OF_A_STEP, listed(found)
