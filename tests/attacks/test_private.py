"""A server that wants what a private participant keeps: its held-back examples, a lost ledger."""

import json
import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from client_app.data.examples import ClientData, load_client_data, open_examples
from client_app.privacy import Privacy, spent_from
from client_app.store import FolderState
from common.accounting import Spent, epsilon
from common.config import ClientSection, NodeConfig, RunConfig, declared
from common.errors import ConfigError, RunError
from common.records import Received
from tests.support.outputs import rows
from tests.support.tiny import HERE, Handler, Wrapped, run_tiny, tiny_config, trusting

METHODS = ["mh-pfedhn", "mh-pfedhn-gd", "mh-pfedhn-pg"]


def take_part(
    folder: Path, *, node: dict[str, Any] | None = None, rounds: int = 2, **settings: Any
) -> list[Received]:
    """Run a federation of one deployed participant; return all that it sent after registering."""
    sent: list[Received] = []

    def watch(message: Message, context: Context, handler: Handler) -> Message:
        reply = handler(message, context)
        if message.metadata.message_type != "query.register":
            sent.append(Received(reply.content))
        return reply

    own = {
        "client-id": "a", "partition-id": 0, "state-dir": str(folder / "state"),
        "dp-noise": 1.0, **trusting(folder, f"{HERE}:small"), **(node or {}),
    }  # fmt: skip
    asked = {"validation_fraction": 0.1, "test_fraction": 0.25, "measure_alone": True, **settings}
    config = tiny_config(folder, server_rule="kernel", rounds=rounds, **asked)
    run_tiny(config, app=Wrapped(watch), node_configs=[own])
    return sent


def ledger(folder: Path) -> FolderState:
    return FolderState(folder / "state" / "a")


def contents(replies: list[Received]) -> list[tuple[dict[str, Any], dict[str, bytes]]]:
    """Return settings but for the clock's and what is drawn by chance, and the arrays' bytes."""
    by_chance = ("federation-id", "nonce", "seconds")
    return [
        (
            {k: v for k, v in reply._config.items() if k not in by_chance},
            {name: array.data for name, array in reply._arrays.items()},
        )
        for reply in replies
    ]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_that_leaves_depends_on_what_is_held_back(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact counts and losses, of weights that a server chooses, would read it out bit by bit."""
    monkeypatch.setattr(Privacy, "generator", lambda _: np.random.default_rng(0))

    def blackened(*args: Any, **kwargs: Any) -> ClientData:
        data = load_client_data(*args, **kwargs)
        return replace(
            data,
            test_images=data.test_images * 0,
            test_labels=data.test_labels * 0,
            validation_images=data.validation_images * 0,
            validation_labels=data.validation_labels * 0,
        )

    common = f"{HERE}:wide"  # with little noise: the two models differ, and one leads
    node = {"dp-noise": 0.2, "dp-clip": 0.05, "global-model": common}
    settings = {"method": method, "distill_alpha": 0.9, "rounds": 4, "global_model": common}
    true = contents(take_part(tmp_path / "true", node=node, **settings))
    monkeypatch.setattr("client_app.participant.load_client_data", blackened)
    other = contents(take_part(tmp_path / "other", node=node, **settings))
    assert true == other
    assert any(arrays for _, arrays in true)
    assert not any("num-test" in told or "test-loss" in told for told, _ in true)


def test_the_participant_itself_sees_what_it_reached(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        take_part(tmp_path)
    assert "client a as received, of 12 test examples: accuracy 0." in caplog.text
    stored = json.loads((ledger(tmp_path).folder / "personal_model.json").read_text())
    assert stored["num_test"] == 12
    assert "gain" in stored
    config = tiny_config(tmp_path)
    assert [row["num_evaluated"] for row in rows(config)] == [0, 0]
    assert all("accuracy_micro" not in row and row["num_accepted"] == 1 for row in rows(config))


def test_a_simulation_is_there_to_be_measured(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, dp_noise=1.0, models=f"{HERE}:small", rounds=1)
    run_tiny(config, num_clients=2)
    assert [row["num_evaluated"] for row in rows(config)] == [2]


def test_what_left_in_the_clear_is_never_private_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    take_part(tmp_path / "clear", rounds=1, node={"dp-noise": 0.0, "state-dir": str(tmp_path)})
    assert spent_from(FolderState(tmp_path / "a")) == [(0.0, 1.0, 1)]
    with caplog.at_level(logging.WARNING):
        take_part(tmp_path / "now", rounds=1, node={"state-dir": str(tmp_path)})
    assert "has no bound: its ledger holds rounds without noise" in caplog.text
    assert rows(tiny_config(tmp_path / "now"))[0]["epsilon_max"] == 1e6
    stored = json.loads((tmp_path / "a" / "personal_model.json").read_text())
    assert stored["epsilon"] is None


def test_a_damaged_ledger_is_not_an_empty_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    take_part(tmp_path / "first", rounds=1, node={"state-dir": str(tmp_path)})
    path = tmp_path / "a" / "privacy_ledger.safetensors"
    damaged = path.read_bytes()[:-3]
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING), pytest.raises(RunError):
        take_part(tmp_path / "second", rounds=1, node={"state-dir": str(tmp_path)})
    assert "what was spent of these examples' privacy is not known" in caplog.text
    assert path.read_bytes() == damaged


def test_a_budget_ends_what_a_server_may_ask(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    once = take_part(tmp_path / "free", rounds=1)
    spent = next(r.value("epsilon", float) for r in once if r.has_setting("epsilon"))
    with caplog.at_level(logging.WARNING), pytest.raises(RunError, match="round 2"):
        take_part(tmp_path / "bound", rounds=3, node={"max-epsilon": spent * 1.01})
    assert "max-epsilon" in caplog.text
    kept = Privacy(1.0, 1.0, 60, ledger(tmp_path / "bound"))
    assert kept.epsilon() == pytest.approx(spent, rel=1e-6)


def told(replies: list[Received]) -> list[float]:
    return [reply.value("epsilon", float) for reply in replies if reply.has_setting("epsilon")]


def test_another_name_is_no_other_examples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator chooses the name that a key is registered with; what was spent stays spent."""
    spent = told(take_part(tmp_path / "1", node={"state-dir": str(tmp_path / "state")}))
    renamed = {"state-dir": str(tmp_path / "state"), "client-id": "b"}
    with pytest.raises(RunError):
        take_part(tmp_path / "2", node=renamed)
    assert "there is a ledger of a, and none of b" in caplog.text
    ledgers = [tmp_path / "state" / name / "privacy_ledger.safetensors" for name in "ab"]
    ledgers[0].rename(ledgers[1])
    assert told(take_part(tmp_path / "3", node=renamed))[0] > spent[-1] > 1


def test_alone_never_leaves_and_spends_nothing(tmp_path: Path) -> None:
    take_part(tmp_path, rounds=1)
    ((noise, rate, steps),) = spent_from(ledger(tmp_path))
    assert (noise, steps) == (1.0, -(-1 // rate) // 1)


def test_a_server_chooses_no_clip(tmp_path: Path) -> None:
    """Noise is in units of it: with a small one, and small gradients, there would be none."""
    asked = {"dp-clip": 0.001, "dp-noise": 2.0}
    run = tuple(tiny_config(tmp_path, **{k.replace("-", "_"): v for k, v in asked.items()})
                .flat().items())  # fmt: skip
    own = {"client-id": "a", "state-dir": str(tmp_path), **trusting(tmp_path)}
    assert declared(run, tuple(own.items())).client.dp_clip == 1.0
    mine = tuple((own | {"dp-clip": 0.5}).items())
    assert declared(run, mine).client.dp_clip == 0.5
    assert declared(run, (("partition-id", 0),)).client.dp_clip == 0.001
    for key, value in {"dp-clip": 1e-30, "dp-noise": 1e200, "learning-rate": 1e27}.items():
        with pytest.raises(ConfigError, match=key):
            RunConfig.parse({key: value})


def test_a_budget_without_noise_is_refused(tmp_path: Path) -> None:
    """A participant that counted on the run's noise sends nothing when there is none."""
    own = {"client-id": "a", "state-dir": str(tmp_path), "max-epsilon": 1.0}
    node = NodeConfig.parse(own | trusting(tmp_path))
    with pytest.raises(ConfigError, match=r"max-epsilon = 1, and neither .* has dp-noise"):
        node.client_section(RunConfig().client)
    assert node.client_section(RunConfig.parse({"dp-noise": 2.0}).client).dp_noise == 2.0


def spend_often(folder: str, start: Any) -> None:
    privacy = Privacy(2.0, 1.0, 60, FolderState(Path(folder)))
    start.wait()
    for _ in range(10):
        privacy.spend(0.5, 1)


def test_two_messages_at_once_lose_no_spending(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    epsilon([Spent(2.0, 0.5, 1)], 1e-5)  # imported once, before they part
    start = fork.Barrier(2)
    both = [fork.Process(target=spend_often, args=(str(tmp_path), start)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert spent_from(FolderState(tmp_path)) == [(2.0, 0.5, 20)]


def test_a_message_adds_no_row_to_the_ledger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each sampling rate is a row for ever, and batch-size travels in messages too."""

    def other(message: Message, context: Context, handler: Handler) -> Message:
        if message.metadata.message_type == "train.personal":
            message.content["config"]["batch-size"] = 7
        return handler(message, context)

    own = {"client-id": "a", "partition-id": 0, "state-dir": str(tmp_path / "state"),
           "dp-noise": 1.0, **trusting(tmp_path, f"{HERE}:small")}  # fmt: skip
    config = tiny_config(tmp_path, server_rule="kernel", rounds=1)
    with pytest.raises(RunError):
        run_tiny(config, app=Wrapped(other), node_configs=[own])
    assert "a message asks for batch-size = 7" in caplog.text
    assert spent_from(ledger(tmp_path)) == []


def test_decoded_pictures_of_many_sizes_are_not_kept(tmp_path: Path) -> None:
    for size in (8, 9, 10, 11, 12):
        section = ClientSection.checked(
            {"dataset": f"{HERE}:patterns", "image-size": size, "cache-dir": str(tmp_path)}, "x"
        )
        open_examples(section)
    kept = sorted(int(p.name.split("-")[-2]) for p in tmp_path.iterdir() if p.is_dir())
    assert kept == [10, 11, 12]
