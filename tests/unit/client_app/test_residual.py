"""Error feedback: nothing of a delta is lost, it only comes later."""

from pathlib import Path

import numpy as np
import pytest

from client_app.store import FolderState, Residual, Stamp, largest_with_residual
from common.compression import Float32, Precision


def send(
    state: FolderState, server_round: int, delta: Float32, *, precision: Precision = "float32"
) -> Float32:
    residual = Residual(state, "left_out", Stamp(server_round, 4))
    return largest_with_residual(delta, residual, top_k=0.1, precision=precision)


def drawn(rounds: int, size: int = 4000) -> list[Float32]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal(size).astype(np.float32) for _ in range(rounds)]


def test_exact_numbers_over_three_rounds(tmp_path: Path) -> None:
    state = FolderState(tmp_path)
    delta = np.array([4, 3, 1, 0, 0, 0, 0, 0, 0, 0], dtype=np.float32)
    assert send(state, 1, delta).tolist() == [4] + [0] * 9
    assert send(state, 2, delta).tolist() == [0, 6] + [0] * 8
    assert send(state, 3, delta).tolist() == [8] + [0] * 9  # what round 2 left out, and its own
    assert delta.tolist() == [4, 3, 1, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_what_was_sent_and_what_is_kept_are_the_dense_sum(
    tmp_path: Path, precision: Precision
) -> None:
    state, deltas = FolderState(tmp_path), drawn(8)
    sent = [send(state, r, d, precision=precision) for r, d in enumerate(deltas, 1)]
    assert all(0 < np.count_nonzero(x) <= 400 for x in sent)
    left_out = Residual(state, "left_out", Stamp(9, 4)).recall(4000)
    np.testing.assert_allclose(sum(sent) + left_out, sum(deltas), atol=2e-5)
    assert np.abs(left_out).max() > 0.5  # and it is not that nothing was left out


def test_round_that_is_repeated_starts_from_the_residual_of_its_time(tmp_path: Path) -> None:
    state, deltas = FolderState(tmp_path), drawn(4)
    sent = [send(state, r, d) for r, d in enumerate(deltas, 1)]
    again = [send(state, r, deltas[r - 1]) for r in (3, 4)]
    np.testing.assert_array_equal(again, sent[2:])


def test_model_that_changed_its_size_starts_with_nothing_left_out(tmp_path: Path) -> None:
    state = FolderState(tmp_path)
    send(state, 1, drawn(1)[0])
    assert send(state, 2, np.arange(10, dtype=np.float32)).tolist() == [0] * 9 + [9]


def test_delta_that_diverged_is_sent_as_such_and_not_remembered(tmp_path: Path) -> None:
    state = FolderState(tmp_path)
    bad = np.array([1, np.nan, 5, 0, 0, 0, 0, 0, 0, np.inf], dtype=np.float32)
    sent = send(state, 1, bad)
    assert np.isnan(sent[1])
    assert np.count_nonzero(sent) == 1
    assert not list(tmp_path.glob("left_out*"))
