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
    return "g"


def norms(updates: list[Update]) -> list[float]:
    return [float(torch.linalg.vector_norm(u.delta)) for u in updates]


def test_off_by_default_and_before_enough_norms_are_known() -> None:
    large = [update("a", 1), update("b", 1e6)]
    for factor in (0, 2):
        assert norms(NormClip(factor).clip_all(large, one_group)) == pytest.approx([1, 1e6])


def test_scales_down_to_the_multiple_of_the_median_and_keeps_the_direction() -> None:
    clip = NormClip(2.5)
    clip.clip_all([update(str(i), float(i)) for i in range(1, LEAST + 1)], one_group)  # median 3
    small, large = clip.clip_all([update("a", 7.0), update("b", 1e6)], one_group)
    assert norms([small]) == pytest.approx([7.0])
    assert norms([large]) == pytest.approx([7.5])
    assert torch.equal(large.delta, torch.full((4,), large.delta[0].item()))


def test_groups_do_not_mix_and_outliers_do_not_drag_the_median() -> None:
    clip = NormClip(2)
    clip.clip_all([update(str(i), 1.0) for i in range(LEAST)], one_group)
    assert norms(clip.clip_all([update("a", 100.0)], lambda _: "other")) == pytest.approx([100.0])
    honest = [update(str(i), 1.0) for i in range(3)]
    for _ in range(50):
        *_, found = norms(clip.clip_all([*honest, update("liar", 1e8)], one_group))
    assert found == pytest.approx(2.0)


def test_survives_a_checkpoint() -> None:
    clip, again = NormClip(2), NormClip(2)
    clip.clip_all([update(str(i), 1.0) for i in range(LEAST)], one_group)
    again.restore(clip.export())
    assert norms(again.clip_all([update("a", 8.0)], one_group)) == norms(
        clip.clip_all([update("a", 8.0)], one_group)
    )
    assert not math.isnan(again.export()["g"][-1])


def sized(client_id: str, norm: float, size: int) -> Update:
    return Update(client_id, torch.full((size,), norm / math.sqrt(size)))


def test_each_update_is_clipped_within_its_group_and_they_come_back_sorted() -> None:
    clip, group_of = NormClip(2), {"a": "9", "b": "2", "c": "9", "d": "2"}.__getitem__
    honest = [update("d", 1.0), update("c", 100.0), update("b", 1.0), update("a", 100.0)]
    for _ in range(3):
        clip.clip_all(honest, group_of)
    got = clip.clip_all([*honest, replace(update("b", 50.0), staleness=1)], group_of)
    assert [(u.client_id, u.staleness) for u in got] == [
        *zip("abbcd", (0, 0, 1, 0, 0), strict=True)
    ]
    assert norms(got) == pytest.approx([100, 1, 2, 100, 1])
    off = NormClip(0)
    assert off.clip_all(honest, group_of) == honest
    assert off.export() == {}


def test_a_step_lets_a_large_client_be_among_small_ones() -> None:
    """Eight of 30 parameters, and one of 3000 whose honest deltas are ten times as long."""
    sections = {"clip-to-median": 3.0, "chunk-size": 10, "embed-dim": 4}
    method = MHpFedHN(RunConfig.parse(PUBLISHED | sections))
    sizes = {**{f"small {i}": 30 for i in range(8)}, "large": 3000}
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

    honest = {name: 10.0 if name == "large" else 1.0 for name in sizes}
    for _ in range(LEAST + 1):
        assert norm_after(honest) == pytest.approx(math.sqrt(8 + 100), rel=1e-5)
    assert norm_after({"small 0": 1e3}) == pytest.approx(
        3.0, rel=1e-5
    )  # three medians of its group
    assert norm_after({"large": 1e3}) == pytest.approx(30.0, rel=1e-5)
