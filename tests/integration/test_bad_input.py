"""Bad input gets a clear error and loses nothing: the run goes on with whoever is left."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message

from common.errors import MHpFedHNError, RunError
from tests.integration.conftest import Lines
from tests.support.outputs import rows, summary, tensors
from tests.support.tiny import HERE, Handler, Wrapped, run_tiny, tiny_config

BAD = 2
"""partition-id, and so client_id, of the client that misbehaves."""


def spoiling(action: str, damage: Callable[[Message], None]) -> Wrapped:
    """The real app, except that client BAD's replies to `action` are damaged."""

    def handle(message: Message, context: Context, handler: Handler) -> Message:
        reply = handler(message, context)
        if message.metadata.message_type == action and context.node_config["partition-id"] == BAD:
            damage(reply)
        return reply

    return Wrapped(handle)


def set_delta(
    change: Callable[[np.ndarray], np.ndarray], name: str = "delta"
) -> Callable[[Message], None]:
    def damage(reply: Message) -> None:
        arrays = reply.content["arrays"]
        changed = {name: Array(change(arrays[name].numpy()))}
        reply.content["arrays"] = ArrayRecord({**arrays, **changed})

    return damage


def drop(record: str) -> Callable[[Message], None]:
    def damage(reply: Message) -> None:
        del reply.content[record]

    return damage


def setting(key: str, value: object) -> Callable[[Message], None]:
    """A reply that says something else than it should, or that answers another message."""

    def damage(reply: Message) -> None:
        reply.content["config"][key] = value

    return damage


def poison(x: np.ndarray) -> np.ndarray:
    x[3] = np.nan
    return x


SOURCE = f"Rejected: train.personal reply of client {BAD} in round 1: "


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_delta(lambda x: x[:-1]), "delta has shape (115,); expected (116,), one entry for"),
        (set_delta(poison), "delta has 1 of 116 entries that are NaN or infinite. Training dive"),
        (set_delta(lambda x: x + np.float32(1e30)), "delta has norm 1.08e+31; at most 1e+04 is"),
        (drop("arrays"), "record 'arrays' is missing; got config."),
    ],
)
@pytest.mark.parametrize("in_flight", [1, 0])
def test_a_bad_reply_is_rejected_and_the_others_go_on(
    tmp_path: Path, logged: Lines, damage: Callable, message: str, in_flight: int
) -> None:
    models = f"{HERE}:small,{HERE}:normed,{HERE}:small"  # client 2 has 116 parameters
    config = tiny_config(
        tmp_path, models=models, max_in_flight=in_flight, buffer_size=in_flight, rounds=2
    )
    run_tiny(config, app=spoiling("train.personal", damage))
    assert logged.find(SOURCE)[0].startswith(SOURCE + message)
    assert summary(config)["status"] == "completed"
    assert [(r["num_accepted"], r["num_failed"]) for r in rows(config)] == [(5, 1), (5, 1)]


GARBAGE = {
    "1e30": set_delta(lambda x: x * np.float32(1e30)),
    "NaN": set_delta(poison),
    "length": set_delta(lambda x: x[:-1]),
    "dtype": set_delta(lambda x: x.astype(np.float64)),
    "stale": setting("server-round", 0),
    "no arrays": drop("arrays"),
    "no settings": drop("config"),
    "nothing at all": lambda reply: reply.content.clear(),
}


GLOBAL_GARBAGE = {
    "global 1e30": set_delta(lambda x: x * np.float32(1e30), "global-delta"),
    "global NaN": set_delta(poison, "global-delta"),
    "global length": set_delta(lambda x: x[:-1], "global-delta"),
    "global dtype": set_delta(lambda x: x.astype(np.float64), "global-delta"),
}
DEFAULT_RULE = {"server_rule": "kernel"}
GD = DEFAULT_RULE | {"method": "mh-pfedhn-gd", "gd_mode": "fused", "evaluation": "fused"}


@pytest.mark.parametrize(
    ("settings", "garbage"),
    [({}, GARBAGE), (DEFAULT_RULE, GARBAGE), (GD, GARBAGE | GLOBAL_GARBAGE)],
    ids=["adam", "kernel", "gd"],
)
def test_nothing_of_a_bad_reply_enters_the_hypernetwork(
    tmp_path: Path, settings: dict[str, object], garbage: dict[str, Callable]
) -> None:
    """Clients whose every reply is rejected leave phi exactly as if they had said nothing.

    Each of the first clients sends garbage of its own kind, the last four what they have learned.
    """
    kinds, count = [*garbage.values()], len(garbage) + 4

    def training_of_a_liar(message: Message, context: Context) -> bool:
        who = int(context.node_config["partition-id"])
        return message.metadata.message_type == "train.personal" and who < len(kinds)

    def refuse(message: Message, context: Context, handler: Handler) -> Message:
        if training_of_a_liar(message, context):
            raise RuntimeError("out of memory")
        return handler(message, context)

    def spoil(message: Message, context: Context, handler: Handler) -> Message:
        reply = handler(message, context)
        if training_of_a_liar(message, context):
            kinds[int(context.node_config["partition-id"])](reply)
        return reply

    found = {}
    for name, handle in {"silent": refuse, "garbage": spoil}.items():
        config = tiny_config(
            tmp_path / name, max_in_flight=0, buffer_size=0, min_fraction=0.1,
            num_partitions=count, **settings,
        )  # fmt: skip
        config = config.with_overrides({"cache-dir": str(tmp_path / "cache")})
        run_tiny(config, app=Wrapped(handle), num_clients=count)
        assert [row["num_accepted"] for row in rows(config)] == [4, 4], name
        found[name] = tensors(config)
    for name, tensor in found["garbage"].items():
        assert torch.equal(tensor, found["silent"][name]), name
        assert torch.isfinite(tensor).all(), name


def test_a_wrong_protocol_version_is_not_admitted(tmp_path: Path, logged: Lines) -> None:
    config = tiny_config(tmp_path)
    run_tiny(config, app=spoiling("query.register", setting("protocol-version", 0)))
    assert "protocol version 0; expected 3. Install the same mh-pfedhn release" in "".join(
        logged.find("Rejected: query.register")
    )
    assert summary(config)["num_clients"] == 5


def test_a_client_over_the_cap_is_not_admitted(tmp_path: Path, logged: Lines) -> None:
    config = tiny_config(tmp_path, max_parameters=200)  # small has 172, normed 116, wide 424
    run_tiny(config)
    assert logged.find("Refused: client 2")[0].endswith(
        "declares 424 parameters; at most 200 are accepted. Use a smaller model, or raise "
        "max-parameters on the server (heads take 129 floats for each parameter)."
    )
    assert summary(config)["num_clients"] == 4


def test_a_client_that_raises_in_training(tmp_path: Path, logged: Lines) -> None:
    config = tiny_config(tmp_path, models=f"{HERE}:small,{HERE}:explodes,{HERE}:wide")
    run_tiny(config)
    line = logged.find("Rejected: train.personal reply of client 2 in round 1")[0]
    assert line.endswith("error 2: RuntimeError: this model cannot run")
    assert summary(config)["status"] == "completed"
    assert rows(config)[-1]["num_accepted"] == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_partitions": 1000}, "1000 clients"),
        (
            {"partition": "dirichlet", "dirichlet_alpha": 0.01, "min_client_examples": 70},
            "min-client-examples",
        ),
        ({"device": "cuda:9"}, "device = 'cuda:9', but torch sees no GPU here"),
    ],
)
def test_clients_that_cannot_start_say_why(tmp_path: Path, overrides: dict, message: str) -> None:
    if "device" in overrides and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = tiny_config(tmp_path, **overrides)
    nodes = [{"partition-id": i} for i in range(3)]
    with pytest.raises(RunError) as caught:
        run_tiny(config, node_configs=nodes)
    assert "0 clients registered within 0 s; min-clients is 1" in str(caught.value)
    assert message in str(caught.value)


def test_a_relative_output_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MHpFedHNError, match="output-dir = 'runs' is relative"):
        run_tiny(tiny_config(tmp_path, output_dir="runs"))


@pytest.mark.parametrize(
    ("count", "line"),
    [
        (
            0,
            "Rejected: query.register reply of client of node 4 in round 1: num-global-parameters ",
        ),
        (10**12, "Refused: client 2: a shared model of 1,000,000,000,000 numbers; at most 12,000,"),
    ],
)
def test_a_global_model_of_no_or_absurd_size_is_not_admitted(
    tmp_path: Path, logged: Lines, count: int, line: str
) -> None:
    config = tiny_config(tmp_path, method="mh-pfedhn-gd", rounds=1)
    run_tiny(config, app=spoiling("query.register", setting("num-global-parameters", count)))
    assert logged.find(line)
    assert summary(config)["num_clients"] == 5


@pytest.mark.parametrize("method", ["mh-pfedhn", "mh-pfedhn-pg"])
def test_a_round_in_which_training_diverged_leaves_no_trace_on_the_client(
    tmp_path: Path, method: str
) -> None:
    """Its BatchNorm statistics and its model trained alone are those of the round before."""

    def handle(message: Message, context: Context, handler: Handler) -> Message:
        settings, client = message.content["config"], context.node_config["partition-id"]
        if client == BAD and settings["server-round"] == 2 and "learning-rate" in settings:
            settings["learning-rate"] = 1e30
        return handler(message, context)

    normed = {"models": f"{HERE}:normed", "global_model": f"{HERE}:normed"}
    config = tiny_config(
        tmp_path, method=method, rounds=3, validation_fraction=0.1, measure_alone=True, **normed
    )
    run_tiny(config, app=Wrapped(handle))
    assert [(r["num_accepted"], r["num_evaluated"]) for r in rows(config)] == [
        (6, 6), (5, 6), (6, 6),
    ]  # fmt: skip
    assert rows(config)[-1]["accuracy_alone"] > 0.5
