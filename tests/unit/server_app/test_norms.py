import json
import math
from dataclasses import replace

import pytest
import torch

from common.config import RunConfig
from server_app.clients import Client
from server_app.hypernet.groups import LEAST, NormClip, Update
from server_app.methods.base import Upload
from server_app.methods.mhpfedhn import Deltas, MHpFedHN
from tests.support.tiny import PUBLISHED

pytestmark = pytest.mark.numeric


def update(client_id: str, norm: float) -> Update:
    return Update(client_id, torch.full((4,), norm / 2))


def one_group(client_id: str) -> str:
    return "7-g"


def two(*_: object) -> int:
    return 2


def norms(updates: list[Update]) -> list[float]:
    return [float(torch.linalg.vector_norm(u.delta)) for u in updates]


def test_off_and_where_nobody_else_is() -> None:
    large = [update("a", 1), update("b", 1e6)]
    assert norms(NormClip(0).clip_all(large, one_group)) == pytest.approx([1, 1e6])
    assert norms(NormClip(2).clip_all(large[1:], one_group, lambda *_: 1)) == [1e6]


def test_on_by_default_from_the_first_step_on() -> None:
    factor = RunConfig().schedule.clip_to_median
    honest = [update(str(i), 1 + i / 10) for i in range(7)]  # median 1.3 with the liars, or near
    liars = [update("x", 1e4), update("y", 1e4)]
    found = norms(NormClip(factor).clip_all([*honest, *liars], one_group))
    assert found[:7] == pytest.approx(norms(honest))
    assert found[7:] == pytest.approx([factor * 1.4] * 2)


def test_scales_down_to_the_multiple_of_the_median_and_keeps_the_direction() -> None:
    clip = NormClip(2.5)
    clip.clip_all([update(str(i), float(i)) for i in (1, 2, 3, 4, 5)], one_group)
    small, large = clip.clip_all([update("a", 7.0), update("b", 1e6)], one_group)  # median 4
    assert norms([small]) == pytest.approx([7.0])
    assert norms([large]) == pytest.approx([10.0])
    assert torch.equal(large.delta, torch.full((4,), large.delta[0].item()))


def test_groups_do_not_mix_and_outliers_do_not_drag_the_median() -> None:
    clip = NormClip(2)
    clip.clip_all([update(str(i), 1.0) for i in range(LEAST)], one_group)
    alone = clip.clip_all([update("a", 100.0)], lambda *_: "1-g", lambda *_: 1)
    assert norms(alone) == pytest.approx([100.0])
    honest = [update(str(i), 1.0) for i in range(3)]
    for _ in range(50):
        *_, found = norms(clip.clip_all([*honest, update("liar", 1e8)], one_group))
    assert found == pytest.approx(2.0)


def test_of_two_the_smaller_decides_and_one_that_replies_often_counts_once() -> None:
    """Twice the factor then: the shares of two honest ones may differ."""
    clip = NormClip(2)

    def counted(**sent: float) -> list[float]:
        found = clip.clip_all([update(name, norm) for name, norm in sent.items()], one_group, two)
        return [round(norm, 3) for norm in norms(found)]

    for _ in range(20):
        assert counted(a=1, b=50) == [1, 4]
        assert counted(b=50) == [4]
    assert counted(a=13, b=50) == [13, 50]
    assert counted(b=50, c=1) == [26, 1]


def test_survives_a_checkpoint() -> None:
    clip, again = NormClip(2), NormClip(2)
    clip.clip_all([update(str(i), 1.0) for i in range(LEAST)], one_group)
    again.restore(clip.export())
    assert norms(again.clip_all([update("a", 8.0)], one_group)) == norms(
        clip.clip_all([update("a", 8.0)], one_group)
    )
    assert json.loads(json.dumps(again.export())) == clip.export()


def sized(client_id: str, norm: float, size: int) -> Update:
    return Update(client_id, torch.full((size,), norm / math.sqrt(size)))


def test_each_update_is_clipped_within_its_group_and_they_come_back_sorted() -> None:
    clip, group_of = NormClip(2), dict(zip("abcdef", "929292", strict=True)).__getitem__
    honest = [update(name, 100.0 if name in "ace" else 1.0) for name in "fedcba"]
    for _ in range(3):
        clip.clip_all(honest, group_of)
    got = clip.clip_all([*honest, replace(update("b", 50.0), staleness=1)], group_of)
    assert [(u.client_id, u.staleness) for u in got] == [
        *zip("abbcdef", (0, 0, 1, 0, 0, 0, 0), strict=True)
    ]
    assert norms(got) == pytest.approx([100, 1, 2, 100, 1, 100, 1])
    off = NormClip(0)
    assert off.clip_all(honest, group_of) == honest
    assert off.export() == {}


def test_a_step_lets_a_large_client_be_among_small_ones() -> None:
    """Eight of 30 parameters, and three of 3000 whose honest deltas are ten times as long."""
    sections = {"clip-to-median": 3.0, "chunk-size": 10, "embed-dim": 4}
    method = MHpFedHN(RunConfig.parse(PUBLISHED | sections))
    sizes = {f"small {i}": 30 for i in range(8)} | {f"large {i}": 3000 for i in range(3)}
    clients = {name: Client(name, size, 1) for name, size in sizes.items()}
    for client in clients.values():
        method.add_client(client)

    def norm_after(norms: dict[str, float]) -> float:
        """The norm over all deltas that reached the hypernetwork."""
        uploads = [
            Upload(clients[name], 1, Deltas(sized(name, norm, sizes[name]).delta.numpy()))
            for name, norm in norms.items()
        ]
        step = method.learn(uploads, server_round=1, progress=1.0)
        return step.rms_delta * math.sqrt(sum(sizes[name] for name in norms))

    honest = {name: 10.0 if "large" in name else 1.0 for name in sizes}
    for _ in range(2):
        assert norm_after(honest) == pytest.approx(math.sqrt(8 + 300), rel=1e-5)
    for name, three_medians in {"small 0": 3.0, "large 0": 30.0}.items():
        assert norm_after({name: 1e3}) == pytest.approx(three_medians, rel=1e-5)


def test_the_first_are_not_believed() -> None:
    clip = NormClip(2)
    for size_of in (lambda *_: LEAST, two):
        clip = NormClip(2)
        assert norms(clip.clip_all([update("liar", 1e4)], one_group, size_of)) == [0.0]
        assert norms(clip.clip_all([update("a", 1.0)], one_group, size_of)) == [1.0]
        bound = 4.0 if size_of is two else 2.0
        assert norms(clip.clip_all([update("liar", 1e4)], one_group, size_of)) == [bound]
    assert norms(clip.clip_all([update("b", 1.0), update("liar", 1e4)], one_group)) == [1.0, 2.0]
