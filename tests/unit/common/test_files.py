import os
import stat
from pathlib import Path

import pytest

from common.files import PRIVATE, best_round, replace_file


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    replace_file(path, "one\r\nline ä\n")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_private_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("was readable by all")
    replace_file(path, "secret", mode=PRIVATE)
    assert stat.S_IMODE(path.stat().st_mode) == PRIVATE


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    replace_file(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_round_is_chosen_by_validation_whatever_the_test_says() -> None:
    tested = (0.5, 0.9, 0.7, 0.8)
    found = [{"round": n, "accuracy_micro": x} for n, x in enumerate(tested, 1)]
    assert best_round(found) is None
    for row, validated in zip(found, (0.6, 0.7, 0.8, None), strict=True):
        row |= {} if validated is None else {"accuracy_validation": validated}
    assert best_round(found) == found[2]
