"""A run that stops tells participants that it pauses, one that is resumed that it goes on."""

import json
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.supercore.exit.exit_handler import trigger_exit_handlers

from common.config import RunConfig
from common.errors import RunError
from common.messages import FINISH, TRAIN
from experiments.__main__ import main
from experiments.run.engines.inprocess import InProcessGrid
from server_app import app as server
from tests.support.outputs import summary
from tests.support.tiny import HERE, Handler, Wrapped, run_tiny, tiny_config, trusting

Capture = pytest.CaptureFixture[str]
SITES = ("a", "b")


def config_at(folder: Path, **settings: Any) -> RunConfig:
    return tiny_config(folder, rounds=4, num_partitions=2, message_timeout_s=20.0, **settings)


def nodes(folder: Path) -> list[dict[str, Any]]:
    own = {**trusting(folder, f"{HERE}:small"), "state-dir": str(folder / "state")}
    return [{"client-id": name, "partition-id": i, **own} for i, name in enumerate(SITES)]


def resumed(config: RunConfig) -> RunConfig:
    return config.with_overrides({"resume-from": config.run.output_dir})


def told(folder: Path, capsys: Capture) -> list[tuple[dict[str, Any] | None, str]]:
    """Return what the status of every site says of a pause, for programs and in words."""
    found = []
    for site in SITES:
        state = str(folder / "state" / site)
        capsys.readouterr()
        assert main(["status", state, "--json"]) == 0
        pause = json.loads(capsys.readouterr().out)["pause"]
        assert main(["status", state]) == 0
        found.append((pause, " ".join(capsys.readouterr().out.split())))
    return found


def fails_in_round_3(message: Message, context: Context, handler: Handler) -> Message:
    if message.metadata.message_type == TRAIN and message.content["config"]["server-round"] == 3:
        raise RuntimeError("the power is gone")
    return handler(message, context)


def test_an_error_and_its_resumption_are_told(tmp_path: Path, capsys: Capture) -> None:
    config = config_at(tmp_path)
    with pytest.raises(RunError, match="usable update"):
        run_tiny(config, node_configs=nodes(tmp_path), app=Wrapped(fails_in_round_3))
    for pause, text in told(tmp_path, capsys):
        assert pause is not None
        assert (pause["round"], pause["continued"]) == (3, False)
        assert f"paused after round 3 since {pause['time']}" in text
    seen: list[Any] = []

    def looks(message: Message, context: Context, handler: Handler) -> Message:
        if message.metadata.message_type == TRAIN:
            seen.extend(told(tmp_path, capsys))
        return handler(message, context)

    run_tiny(resumed(config), node_configs=nodes(tmp_path), app=Wrapped(looks))
    assert len(seen) == 2 * len(SITES)
    for pause, text in seen:
        assert (pause["round"], pause["continued"]) == (4, True)
        assert "continued at round 4" in text
    for pause, text in told(tmp_path, capsys):
        assert pause is None
        assert "the run has ended" in text
        assert "continued" not in text


def test_a_run_that_ends_in_order_has_not_paused(tmp_path: Path, capsys: Capture) -> None:
    run_tiny(config_at(tmp_path), node_configs=nodes(tmp_path))
    trigger_exit_handlers(run_before_force_exit=True)  # as Flower does when its process ends
    assert [pause for pause, _ in told(tmp_path, capsys)] == [None, None]


def test_a_signal_is_told_before_flower_gives_up_the_run(tmp_path: Path, capsys: Capture) -> None:
    """Its handler calls exit handlers, then ends the process; another signal comes meanwhile."""

    def stopped(message: Message, context: Context, handler: Handler) -> Message:
        if message.metadata.message_type == FINISH:
            signal.raise_signal(signal.SIGINT)
        in_round = message.metadata.message_type == TRAIN and message.content["config"]
        if in_round and in_round["server-round"] == 2:
            trigger_exit_handlers(run_before_force_exit=True)
            sys.exit(0)
        return handler(message, context)

    config, before = config_at(tmp_path), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        run_tiny(config, node_configs=nodes(tmp_path), app=Wrapped(stopped))
    assert signal.getsignal(signal.SIGINT) is before
    assert summary(config)["status"] == "interrupted"
    for pause, text in told(tmp_path, capsys):
        assert pause is not None
        assert "paused after round 1" in text
    run_tiny(resumed(config), node_configs=nodes(tmp_path))
    assert "the run has ended" in told(tmp_path, capsys)[0][1]


class HangingGrid(InProcessGrid):
    """A SuperLink that does not answer when the run has stopped."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        if any(message.metadata.message_type == FINISH for message in messages):
            time.sleep(20)
            raise ConnectionError("nobody is there")
        return super().push_messages(messages)


def test_nobody_waits_for_a_server_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(server, "PAUSE_S", 0.3)
    left: list[float] = []

    def noted(message: Message, context: Context, handler: Handler) -> Message:
        left.append(time.monotonic())
        return fails_in_round_3(message, context, handler)

    with pytest.raises(RunError, match="usable update"):
        run_tiny(
            config_at(tmp_path), node_configs=nodes(tmp_path), app=Wrapped(noted),
            grid_type=HangingGrid,
        )  # fmt: skip
    assert time.monotonic() - left[-1] < 10
    assert [pause for pause, _ in told(tmp_path, capsys)] == [None, None]
