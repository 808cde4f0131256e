"""What one participant declares of itself decides nothing for the others and costs little."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message

from common.config import RunConfig
from common.messages import REGISTER, Registration
from server_app.admission import Admission, majority_first
from server_app.clients import CHANGE_ROUNDS, Registry
from tests.integration.conftest import Lines
from tests.support.outputs import rows
from tests.support.tiny import HERE, Handler, Small, Wrapped, run_tiny, tiny_config, trusting

LIAR = 0  # the first to register


def claiming(claims: Callable[[int], Mapping[str, Any]], kind: str = "query.register") -> Wrapped:
    """The real app; what client 0 says in replies of a kind is replaced, by round."""

    def handle(message: Message, context: Context, handler: Handler) -> Message:
        lies = context.node_config["partition-id"] == LIAR
        try:
            reply = handler(message, context)
        except Exception:  # what it was sent is not for the model that it has
            return Message(message.content, reply_to=message)
        if lies and message.metadata.message_type == kind:
            config = dict(reply.content.config_records["config"])
            config |= claims(int(config["server-round"]))
            reply.content["config"] = ConfigRecord(config)
        return reply

    return Wrapped(handle)


def heads(folder: Path) -> dict[str, int]:
    newest = max((folder / "run" / "checkpoint").iterdir())
    found: dict[str, int] = json.loads((newest / "meta.json").read_text())["learned"]["hypernet"]
    return found["heads"]  # type: ignore[return-value]


@pytest.mark.parametrize("rule", ["kernel", "adam"])
def test_another_size_in_every_round_keeps_no_group_and_is_asked_once(
    tmp_path: Path, logged: Lines, rule: str
) -> None:
    config = tiny_config(tmp_path, rounds=5, server_rule=rule, models=f"{HERE}:small")
    run_tiny(config, app=claiming(lambda number: {"num-parameters": 1_000_000 + 1000 * number}))
    assert len(heads(tmp_path)) == 2  # the honest participants' and one of the liar's
    assert len(logged.find("Client 0 changed from")) == 1, "asked again once"
    assert [row["num_accepted"] for row in rows(config)] == [5] * 5


@pytest.mark.parametrize("method", ["mh-pfedhn-gd", "mh-pfedhn-pg", "fml"])
def test_the_first_does_not_decide_the_size_of_what_is_shared(
    tmp_path: Path, method: str, logged: Lines
) -> None:
    settings = {"min_clients": 3, "wait_for_clients_s": 5.0, "validation_fraction": 0.1}
    config = tiny_config(tmp_path, method=method, rounds=1, **settings)
    run_tiny(config, app=claiming(lambda _: {"num-global-parameters": 1}))
    assert rows(config)[0]["num_accepted"] == 5
    assert logged.find("Refused: client 0 has num_global_parameters = 1")


def test_the_operator_decides_the_size_of_what_is_shared(tmp_path: Path, logged: Lines) -> None:
    """With two participants, or where one is enough, the first could."""
    size = Small(8, 4)
    honest = sum(p.numel() for p in size.parameters())
    config = tiny_config(tmp_path, method="mh-pfedhn-gd", rounds=1, global_parameters=honest)
    run_tiny(config, num_clients=2, app=claiming(lambda _: {"num-global-parameters": 1}))
    assert rows(config)[0]["num_accepted"] == 1
    assert logged.find("Refused: client 0 has num_global_parameters = 1")


def test_another_model_is_taken_once_in_a_while() -> None:
    def said(size: int) -> Registration:
        return Registration("a", size, 5)

    registry = Registry(10**6, lambda *_: None)
    registry.unknown_nodes([2], 1, 0.0)
    assert registry.admit(2, said(5), 1)
    assert registry.admit(2, said(6), 2)
    assert registry.admit(2, said(7), 3) is None
    (why,) = registry.refusals()
    assert f"comes with another model again; it may from round {2 + CHANGE_ROUNDS} on" in why
    assert registry.admit(2, said(7), 2 + CHANGE_ROUNDS)


def test_a_node_keeps_its_name(tmp_path: Path, logged: Lines) -> None:
    """Another one in every round, each with an embedding, would fill the server's memory."""
    config = tiny_config(tmp_path, rounds=4, models=f"{HERE}:small")

    def handle(message: Message, context: Context, handler: Handler) -> Message:
        reply = handler(message, context)
        number = int(reply.content["config"]["server-round"])
        if context.node_config["partition-id"] == LIAR:
            if message.metadata.message_type == "query.register":
                reply.content["config"]["client-id"] = f"name {number}"
            elif message.metadata.message_type == "train.personal":
                reply.content["arrays"].clear()  # who does not fit is asked again who it is
        return reply

    run_tiny(config, app=Wrapped(handle))
    assert len(logged.find("Client name ")) == 1
    assert len(logged.find("Refused: node 2 comes as client name 2; in round 1 it was")) == 1


def test_what_most_declare_comes_first() -> None:
    def said(size: int) -> Registration:
        return Registration("a", 5, 5, num_global_parameters=size)

    found = majority_first({2: said(9), 3: said(7), 4: said(7), 5: said(8), 6: said(8)})
    assert [node for node, _ in found] == [3, 4, 5, 6, 2]


def test_examples_that_nobody_can_have_make_no_accuracy(tmp_path: Path) -> None:
    settings = {"rounds": 2, "models": f"{HERE}:small", "evaluation": "separate"}
    honest = tiny_config(tmp_path / "honest", **settings)
    run_tiny(honest)
    lying = tiny_config(tmp_path / "lying", **settings)
    claims = {"num-test": 2**24, "num-correct": 2**24}
    run_tiny(lying, app=claiming(lambda _: claims, "evaluate.personal"))
    micro, macro = (rows(lying)[-1][name] for name in ("accuracy_micro", "accuracy_macro"))
    before = rows(honest)[-1]["accuracy_micro"]
    assert micro <= (5 * before + 10) / 15 + 0.1  # ten medians against five
    assert macro <= (5 * before + 1) / 6 + 0.1
    absurd = tiny_config(tmp_path / "absurd", **settings)
    run_tiny(absurd, app=claiming(lambda _: {"num-test": 10**12}, "evaluate.personal"))
    assert rows(absurd)[-1]["num_evaluated"] == 5


@pytest.mark.parametrize(
    "claims",
    [{"seconds": -1.0}, {"train-loss": -1.0}, {"train-loss": 1e9}, {"num-examples": 10**6}],
)
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, claims: Mapping[str, Any]) -> None:
    config = tiny_config(tmp_path, rounds=1, models=f"{HERE}:small")
    run_tiny(config, app=claiming(lambda _: claims, "train.personal"))
    assert rows(config)[0]["num_accepted"] == 5


def test_who_is_refused_is_told_why_at_once(tmp_path: Path) -> None:
    """In its own folder, where `join` looks; the others train meanwhile."""
    state = tmp_path / "state"
    nodes = [
        {"client-id": name, "partition-id": i, "num-partitions": 6, "state-dir": str(state),
         **trusting(tmp_path, f"{HERE}:small")}
        for i, name in enumerate(["good", "bad", "late"])
    ]  # fmt: skip
    nodes[1]["model"] = f"{HERE}:wide"
    nodes.append(nodes[2] | {"partition-id": 3})  # of the same name
    config = tiny_config(tmp_path, rounds=1, max_parameters=200, models=f"{HERE}:small")
    run_tiny(config, node_configs=nodes)
    assert [row["num_accepted"] for row in rows(config)] == [2]
    told = json.loads((state / "bad" / "refusal.json").read_text())
    assert "declares 424 parameters; at most 200 are accepted" in told["reason"]
    assert told["final"] is True
    other = json.loads((state / "late" / "refusal.json").read_text())
    assert "Two participants cannot share one identity" in other["reason"]
    assert other["final"] is False, "it may be its own of a moment ago"
    assert not (state / "good" / "refusal.json").exists()


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_nodes_that_take_turns_do_not_keep_a_run_from_starting() -> None:
    clock = Clock()

    def online() -> list[int]:
        assert clock.now < 3600, "the run never begins"
        return [1, 2, 3, 100 + int(clock.now // 1.5) % 2]

    config = RunConfig.parse({"min-clients": 3, "wait-for-clients-s": 300.0})
    transport: Any = SimpleNamespace(clock=clock, grid=SimpleNamespace(get_node_ids=online))
    registry = Registry(10**6, lambda *_: None)
    admission = Admission(config, transport, registry, lambda _: None)
    admission._settle(2.0)
    assert clock.now < 10


def said_by(node: int) -> Registration:
    """Nodes 1 to 3 fit; what node 4 has is larger than the server takes."""
    return Registration(f"c{node}", 10**7 if node == 4 else 10, 10)


def times_that_all_wait(flapping: int, exchange: Callable[[Clock, Any], Any], read: Any) -> int:
    """Count rounds, of 32, in which nodes 1 and 2 wait for one that is here in every other one."""
    clock, here = Clock(), set[int]()
    transport: Any = SimpleNamespace(
        clock=clock, exchange=lambda messages: exchange(clock, messages), busy_nodes=set,
        recent=[], silent=set(), read=read, attempt=lambda call: dict.fromkeys(here),
        message=lambda kind, recipient, *_, **__: -recipient.node_id,
    )  # fmt: skip
    registry = Registry(10**6, lambda *_: None)
    admission = Admission(RunConfig.parse({"min-clients": 2}), transport, registry, lambda _: None)
    admission._settled = True
    admission._question = lambda node, *_: node  # type: ignore[assignment,method-assign]
    count = 0
    for number in range(1, 33):
        here = {1, 2, flapping} if number % 2 else {1, 2}
        before = clock.now
        admission.refresh(number)
        count += clock.now - before > 5
    return count


def arrived(node: int, failure: str = "") -> Any:
    return SimpleNamespace(pending=SimpleNamespace(node_id=node), failure=failure)


def test_who_is_silent_and_goes_away_is_asked_less_and_less() -> None:
    def exchange(clock: Clock, messages: Any) -> Any:
        for node in messages:
            clock.now += 60.0 if node == 3 else 0.0
            yield arrived(node, "no answer within 60 s" if node == 3 else "")

    def read(arrival: Any, _: object) -> Registration | None:
        node = arrival.pending.node_id
        return None if node == 3 else said_by(node)

    assert times_that_all_wait(3, exchange, read) <= 6


def test_who_takes_its_time_is_asked_less_and_less() -> None:
    """Away every other round, it would have everybody wait for it each time it comes back."""

    def exchange(clock: Clock, messages: Any) -> Any:
        for node in sorted(messages, key=lambda node: node == 3):
            clock.now += 59.0 if node == 3 else 0.0
            yield arrived(node)

    assert times_that_all_wait(3, exchange, lambda a, _: said_by(a.pending.node_id)) <= 6


def test_who_takes_no_notice_is_asked_less_and_less() -> None:
    """It is prompt, is refused, says nothing to that, and is back in the round after the next."""

    def exchange(clock: Clock, messages: Any) -> Any:
        for node in messages:
            clock.now += 10.0 if node == -4 else 0.0
            yield arrived(abs(node), "no answer within 10 s" if node == -4 else "")

    assert times_that_all_wait(4, exchange, lambda a, _: said_by(a.pending.node_id)) <= 6


def test_a_reason_is_a_few_words_of_whoever_gives_it(tmp_path: Path) -> None:
    def spoil(message: Message, context: Context, handler: Handler) -> Message:
        is_asked = message.metadata.message_type == REGISTER
        if is_asked and context.node_config["partition-id"] == 3:
            return Message(Error(1, "x\x1b[2J" * 9000), reply_to=message)
        return handler(message, context)

    config = tiny_config(tmp_path, rounds=1, min_clients=2)
    run_tiny(config, num_clients=4, app=Wrapped(spoil))
    said = (tmp_path / "run" / "attendance.json").read_text()
    assert "xxx" not in said
    assert len(said) < 6000
