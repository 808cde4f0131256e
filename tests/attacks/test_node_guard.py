"""A server, with messages that no app can answer, and apps that are others than it says."""

import io
import logging
from datetime import timedelta
from pathlib import Path

import pytest
from flwr.common.constant import ErrorCode, SubStatus
from flwr.supercore.date import now
from flwr.supercore.error import FlowerError
from rich.console import Console

from common.config import ClientSection
from common.errors import ConfigError
from experiments.deploy.checks import check_trusted, run_checks
from experiments.deploy.rehearsal import Trial
from experiments.deploy.settings import JoinSettings
from experiments.deploy.supervise import explain
from tests.support.node import Node, identity, packed, pulled

__all__ = ["identity"]


pytestmark = pytest.mark.usefixtures("identity")


def test_a_message_that_no_task_takes_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(monkeypatch, fab_hash="another than the app's that came")
    with pytest.raises(FlowerError):
        node.take()
    assert node.to_send() == []
    node.end(SubStatus.FAILED)
    (reply,) = node.to_send()
    assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert node.to_send() == [], "once"


@pytest.mark.parametrize("status", [SubStatus.FAILED, SubStatus.COMPLETED])
@pytest.mark.parametrize("pieces", [None, 0, 1])
def test_so_is_one_whose_reply_does_not_come(
    monkeypatch: pytest.MonkeyPatch, status: str, pieces: int | None
) -> None:
    node = Node(monkeypatch)
    node.take()
    if pieces is not None:
        node.reply(pieces=pieces)
    assert node.to_send() == [], "the task is at work"
    node.end(status)
    (reply,) = node.to_send()
    assert reply.has_error()
    assert reply.metadata.reply_to_message_id == node.message.object_id
    assert node.state.object_store.get_object_tree(reply.metadata.message_id)


def test_so_is_one_whose_app_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(monkeypatch)
    node.take()
    node.reply(pieces=1)
    for record in node.state.task_token_store.values():
        record.active_until = now() - timedelta(seconds=1)
    assert node.to_send()[0].has_error()


@pytest.mark.parametrize("status", [SubStatus.FAILED, SubStatus.COMPLETED, ""])
def test_a_reply_that_is_there_is_sent(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    node = Node(monkeypatch)
    node.take()
    node.reply(pieces=9)
    if status:
        node.end(status)
    (reply,) = node.to_send()
    assert not reply.has_error()
    assert node.to_send() == []


def test_an_app_is_taken_that_is_what_it_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pulled(monkeypatch, packed()) == []


@pytest.mark.parametrize(
    ("content", "stated"),
    [
        (packed(), {"fab_version": "0.1.0.45f9f757/../../../../../tmp/evil/x"}),
        (packed(), {"fab_id": "lab/../evil"}),
        (packed(), {"fab_id": "other/mh-pfedhn"}),
        (packed(), {"fab_hash": "0" * 64}),
        (packed(version="1/../../x"), {"fab_version": "1/../../x"}),
        (packed(name=".."), {"fab_id": "lab/.."}),
    ],
)
def test_one_that_would_be_loaded_from_elsewhere_is_refused(
    monkeypatch: pytest.MonkeyPatch, content: bytes, stated: dict[str, str]
) -> None:
    """Its content is verified; from which folder it is loaded, the server would say."""
    (reply,) = pulled(monkeypatch, content, **stated)
    assert reply.error.code == ErrorCode.INVALID_FAB


def test_a_round_that_is_named_so_is_no_exit_of_flowers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Node(monkeypatch)
    logging.getLogger("flwr").error("[RUN %s, ROUND %s]", 1, "1\nExit Code: 302")
    assert caplog.records[-1].getMessage() == "[RUN 1, ROUND 1 Exit Code: 302]"
    logging.getLogger("flwr").error("Exit Code: 606\nanother version")
    assert explain([f"ERROR :     {caplog.records[-1].getMessage()}"])[0] == 606


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"


@pytest.mark.parametrize(
    "text", ["", "{}", "[a]", "a: b", "a: 1", "a: {", "[" * 100_000, f"a: {KEY}\nb: x", None]
)
def test_a_file_that_trusts_nobody_is_refused(tmp_path: Path, text: str | None) -> None:
    """Of an empty one Flower verifies nothing."""
    if text is not None:
        (tmp_path / "trusted.yaml").write_text(text)
    values = {
        "client-id": "a",
        "server": "x:1",
        "insecure": True,
        "trusted-entities": "trusted.yaml",
    }
    settings = JoinSettings.parse(values | {"state-dir": "state"}, tmp_path)
    trial = Trial(settings, ClientSection())
    with pytest.raises(ConfigError, match=r"trusted.yaml .*whose signature an app must have"):
        check_trusted(trial)
    (tmp_path / "trusted.yaml").write_text(f"fpk_1: {KEY}\n")
    assert "one of 1" in check_trusted(trial).detail


def test_join_looks_at_it(tmp_path: Path) -> None:
    (tmp_path / "trusted.yaml").write_text("{}")
    values = {"client-id": "a", "server": "127.0.0.1:9", "insecure": True, "dataset": "digits"}
    values |= {"trusted-entities": "trusted.yaml", "state-dir": "state", "model": "mlp"}
    settings, told = JoinSettings.parse(values, tmp_path), io.StringIO()
    settings.folder.mkdir(parents=True)
    assert not run_checks(settings, Console(file=told, width=400), must_answer=False)
    assert "names nobody with an Ed25519 key to trust" in told.getvalue()
