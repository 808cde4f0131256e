"""Replies that Flower puts together from pieces: within bounds, and each on its own."""

import json
import tracemalloc
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.task_identity import TaskIdentity

from common.inflation import GRID, bound_replies, counted

MOST = 4 * 2**20
TIMES = 1500


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Flower's own grid module, bounded while a test runs."""
    from flwr.superlink.grid import http_grid

    assert http_grid.__name__ == GRID
    for name in ("pull_objects", "inflate_object_from_contents"):
        monkeypatch.setattr(http_grid, name, getattr(http_grid, name))
    bound_replies(lambda: MOST)
    return http_grid


def pieces(
    length: int, more: Mapping[str, Any] = MappingProxyType({})
) -> tuple[str, dict[str, bytes]]:
    """A reply with an array (length,), float32, as a peer hands it in: contents by id."""
    arrays = ArrayRecord({"delta": Array(np.arange(length, dtype=np.float32))})
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    question = Message(RecordDict(), 7, "train.personal")
    question.metadata.__dict__["_message_id"] = "asked"
    reply = Message(RecordDict({"arrays": arrays, **more}), reply_to=question)
    found = {name: one.deflate() for name, one in get_all_nested_objects(reply).items()}
    return reply.object_id, found


def changed(contents: dict[str, bytes], kind: str, old: bytes, new: bytes) -> dict[str, bytes]:
    """Replace bytes of the objects of one kind, under the ids that they had."""
    kinds = {n: get_object_head_values_from_object_content(c)[0] for n, c in contents.items()}
    return {n: c.replace(old, new) if kinds[n] == kind else c for n, c in contents.items()}


def described(contents: dict[str, bytes], **claims: object) -> dict[str, bytes]:
    """Replace what an array says of itself."""
    found = {}
    for name, content in contents.items():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == "Array":
            body = json.dumps(json.loads(content.split(b"\x00", 1)[1]) | claims).encode()
            content = f"Array {','.join(children)} {len(body)}\x00".encode() + body
        found[name] = content
    return found


def test_an_honest_reply_is_put_together(grid: ModuleType) -> None:
    name, contents = pieces(1000)
    reply = grid.inflate_object_from_contents(name, contents)
    assert reply.content["arrays"]["delta"].numpy().tolist() == list(range(1000))


def test_a_piece_that_is_named_often_is_not_copied(grid: ModuleType) -> None:
    name, contents = pieces(250_000)
    spoiled = described(contents, arraychunk_ids=[0] * TIMES)
    tracemalloc.start()
    reply = grid.inflate_object_from_contents(name, spoiled)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reply.metadata.reply_to_message_id == "asked"
    assert "more than the 4,194,304 bytes" in reply.error.reason
    assert peak < MOST


BAD = {
    "a shape of words": {"shape": ["x"]},
    "pieces that are not there": {"arraychunk_ids": [3]},
    "no list of pieces": {"arraychunk_ids": None},
    "a type that is none": {"dtype": 3, "stype": {}},
    "a long description": {"dtype": "x" * 2**21},
}


@pytest.mark.parametrize("how", BAD)
def test_what_cannot_be_put_together_is_a_reply_with_an_error(grid: ModuleType, how: str) -> None:
    name, contents = pieces(100)
    reply = grid.inflate_object_from_contents(name, described(contents, **BAD[how]))
    if reply.has_error():
        assert reply.metadata.reply_to_message_id == "asked"
    else:  # it is the reader who looks at what an array claims
        assert how in ("a shape of words", "a type that is none")


@pytest.mark.parametrize("record", [ConfigRecord, MetricRecord])
def test_settings_are_small(grid: ModuleType, record: type[ConfigRecord | MetricRecord]) -> None:
    """A million numbers of two bytes each are twenty times as much memory."""
    name, contents = pieces(100, {"more": record({"many": [1] * 100_000})})
    tracemalloc.start()
    reply = grid.inflate_object_from_contents(name, contents)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reply.has_error()
    assert f"its {record.__name__} has" in reply.error.reason
    assert peak < 2**17


@pytest.mark.parametrize("kind", ["RecordDict", "ArrayRecord", "ArrayChunk"])
def test_pieces_of_another_kind(grid: ModuleType, kind: str) -> None:
    name, contents = pieces(100)
    for new in (b"Nothing", b"Message", b"ConfigRecord"):
        spoiled = changed(contents, kind, kind.encode(), new)
        reply = grid.inflate_object_from_contents(name, spoiled)
        assert reply.has_error()
        assert reply.metadata.reply_to_message_id == "asked"


@pytest.mark.parametrize("body", [b"\xff" * 20, b""])
def test_a_reply_that_does_not_say_what_it_answers_harms_no_other(
    grid: ModuleType, body: bytes
) -> None:
    reply = grid.inflate_object_from_contents(
        "x", {"x": f"Message  {len(body)}\x00".encode() + body}
    )
    assert reply.has_error()
    assert reply.metadata.reply_to_message_id == ""


def test_the_pieces_of_a_reply_are_counted_while_they_come() -> None:
    pull = counted(lambda _: b"x" * 1000, 2500)
    assert len(pull("a")) + len(pull("b")) == 2000
    with pytest.raises(ObjectPullError):
        pull("c")
