import math

import pytest
import torch

from server_app.norms import LEAST, NormClip
from server_app.update import ClientUpdate


def update(client_id: str, norm: float) -> ClientUpdate:
    return ClientUpdate(client_id, torch.full((4,), norm / 2))


def norms(updates: list[ClientUpdate]) -> list[float]:
    return [float(torch.linalg.vector_norm(u.delta)) for u in updates]


def test_off_by_default_and_before_enough_norms_are_known() -> None:
    assert norms(NormClip(0).clip("g", [update("a", 1e6)])) == [1e6]
    assert norms(NormClip(2).clip("g", [update("a", 1), update("b", 1e6)])) == [1, 1e6]


def test_scales_down_to_the_multiple_of_the_median_and_keeps_the_direction() -> None:
    clip = NormClip(2.5)
    clip.clip("g", [update(str(i), float(i)) for i in range(1, LEAST + 1)])  # median 3
    small, large = clip.clip("g", [update("a", 7.0), update("b", 1e6)])
    assert norms([small]) == [7.0]
    assert norms([large]) == pytest.approx([7.5])
    assert torch.equal(large.delta, torch.full((4,), large.delta[0].item()))


def test_groups_do_not_mix_and_outliers_do_not_drag_the_median() -> None:
    clip = NormClip(2)
    clip.clip("g", [update(str(i), 1.0) for i in range(LEAST)])
    assert norms(clip.clip("other", [update("a", 100.0)])) == [100.0]
    honest = [update(str(i), 1.0) for i in range(3)]
    for _ in range(50):
        *_, found = norms(clip.clip("g", [*honest, update("liar", 1e8)]))
    assert found == pytest.approx(2.0)


def test_order_of_arrival_does_not_matter() -> None:
    found = []
    for order in (1, -1):
        clip = NormClip(2)
        updates = [update(str(i), float(i + 1)) for i in range(8)][::order]
        clip.clip("g", updates)
        found.append(clip.export())
    assert found[0] == found[1]


def test_survives_a_checkpoint() -> None:
    clip, again = NormClip(2), NormClip(2)
    clip.clip("g", [update(str(i), 1.0) for i in range(LEAST)])
    again.restore(clip.export())
    assert norms(again.clip("g", [update("a", 8.0)])) == norms(clip.clip("g", [update("a", 8.0)]))
    assert not math.isnan(again.export()["g"][-1])
