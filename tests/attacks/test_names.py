"""Names that participants give themselves: somebody else's, and words that mean something else."""

from pathlib import Path

import pytest
from flwr.app import Context, Message

from experiments.__main__ import main
from server_app.output.checkpoint import load_checkpoint
from tests.integration.conftest import Lines
from tests.support.attendance import attended_by
from tests.support.outputs import checkpoints, rows
from tests.support.tiny import HERE, Handler, Wrapped, run_tiny, tiny_config


def calling_itself(*names: str) -> Wrapped:
    """The real app; the first participants register under these names."""

    def handle(message: Message, context: Context, handler: Handler) -> Message:
        reply = handler(message, context)
        number = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query.register" and number < len(names):
            reply.content["config"]["client-id"] = names[number]
        return reply

    return Wrapped(handle)


@pytest.mark.parametrize("rule", ["kernel", "adam"])
def test_a_name_that_is_a_word_of_the_checkpoint_can_be_changed(tmp_path: Path, rule: str) -> None:
    """It is changed where it names a client, and nowhere else; the run goes on."""
    words = ("num_examples", "clients", "client_id", "weight", "early")
    config = tiny_config(tmp_path, rounds=2, server_rule=rule, models=f"{HERE}:small")
    run_tiny(config, app=calling_itself(*words))
    others = load_checkpoint(checkpoints(config)[-1]).tensors
    for word in words:
        assert main(["rename", config.run.output_dir, word, f"site of {word}"]) == 0
    known = {row["client_id"] for row in load_checkpoint(checkpoints(config)[-1]).meta["registry"]}
    assert known >= {f"site of {word}" for word in words}
    tensors = load_checkpoint(checkpoints(config)[-1]).tensors
    of_clients = ("embeddings.", "personal.", "alone.", "newest.")
    assert {name for name in tensors if not any(part in name for part in of_clients)} == {
        name for name in others if not any(part in name for part in of_clients)
    }
    on = config.with_overrides({"resume-from": config.run.output_dir, "rounds": 3})
    run_tiny(on, app=calling_itself(*(f"site of {word}" for word in words)))
    assert [row["num_accepted"] for row in rows(on)] == [rows(on)[0]["num_accepted"]] * 3
    assert load_checkpoint(checkpoints(on)[-1]).tensors.keys() == tensors.keys(), "nobody new"


def test_what_cannot_be_loaded_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, rounds=2, models=f"{HERE}:small")
    run_tiny(config)
    before = checkpoints(config)
    monkeypatch.setattr("experiments.deploy.rename._learned", lambda learned, _: learned)
    assert main(["rename", config.run.output_dir, "0", "site-x"]) == 2
    assert "Nothing has changed" in " ".join(capsys.readouterr().err.split())
    assert checkpoints(config) == before


@pytest.mark.parametrize("mode", ["auto", "bind"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_name_that_the_operator_gave_is_its_owners(
    tmp_path: Path, logged: Lines, mode: str, alone: bool
) -> None:
    """Another enrolled key may come first, even before its owner: it has the name no longer."""
    keys, names = {0: b"evil", 1: b"a", 2: b"b"}, {0: "evil", 1: "site-a", 2: "site-b"}
    settings = {"rounds": 4, "min_clients": 1, "max_in_flight": 0, "buffer_size": 0}
    config = tiny_config(tmp_path, client_keys=mode, models=f"{HERE}:small", **settings)
    plan = attended_by(lambda look: (0, 1) if alone and look < 3 else (0, 1, 2), keys, names)
    said = calling_itself("site-b", "site-a", "site-b")
    run_tiny(config, num_clients=3, app=said, grid_type=plan)
    assert logged.find(
        "Refused: client site-b (node 2) has a client-id that is the name of another"
    )
    assert not logged.find("Refused: client site-b (node 4)")
    assert [row["num_accepted"] for row in rows(config)][-2:] == [2, 2]
    (owner,) = (
        row for row in load_checkpoint(checkpoints(config)[-1]).meta["registry"]
        if row["client_id"] == "site-b"
    )  # fmt: skip
    assert owner["node_id"] == 4
