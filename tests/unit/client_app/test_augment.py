"""Training pictures changed at random: which, how far, and that everything else stays."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from client_app.data.augment import draw_moves, moved
from client_app.data.examples import ClientData
from common.config import ClientSection, NodeConfig, RunConfig
from common.errors import ConfigError, ModelError
from tests.unit.client_app.pictures import client_data, load


def augmented(*names: str) -> ClientData:
    return replace(client_data(), augmentation=names)


def epoch(data: ClientData, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(data.batches(16, torch.Generator().manual_seed(seed)))


def slow(picture: Tensor, flip: int, down: int, right: int) -> Tensor:
    """Flip, pad with black, cut out."""
    size, pad = picture.shape[-1], 4
    black = torch.zeros(len(picture), size + 2 * pad, size + 2 * pad, dtype=picture.dtype)
    black[:, pad : pad + size, pad : pad + size] = picture.flip(2) if flip else picture
    return black[:, pad + down : pad + down + size, pad + right : pad + right + size]


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_move_as_one_by_one(channels: int) -> None:
    images = client_data().train_images[:, :channels]
    moves = draw_moves(("flip", "crop"), len(images), 32, torch.Generator().manual_seed(1))
    found = moved(images, moves)
    expected = [slow(x, *m) for x, m in zip(images, moves.T.tolist(), strict=True)]
    assert torch.equal(found, torch.stack(expected))
    assert found.dtype == torch.uint8
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_a_known_picture_is_cropped() -> None:
    picture = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3)
    found = moved(picture, torch.tensor([[0], [1], [-1]]))
    assert found[0, 0].tolist() == [[0, 4, 5], [0, 7, 8], [0, 0, 0]]
    flipped = moved(picture, torch.tensor([[1], [0], [0]]))
    assert flipped[0, 0].tolist() == [[3, 2, 1], [6, 5, 4], [9, 8, 7]]


def test_half_are_flipped_and_crops_go_to_an_eighth() -> None:
    flip, down, right = draw_moves(("flip", "crop"), 4000, 32, torch.Generator().manual_seed(2))
    assert float(flip.double().mean()) == pytest.approx(0.5, abs=0.03)
    for shift in (down, right):
        assert sorted(set(shift.tolist())) == list(range(-4, 5))
    assert not torch.equal(down, right)


@pytest.mark.parametrize(("name", "still"), [("flip", [1, 2]), ("crop", [0])])
def test_what_is_not_named_is_not_done(name: str, still: list[int]) -> None:
    moves = draw_moves((name,), 100, 32, torch.Generator().manual_seed(3))
    assert moves.any()
    assert not moves[still].any()


def test_an_epoch_keeps_order_and_labels_and_repeats() -> None:
    plain, changed = epoch(client_data()), epoch(augmented("flip", "crop"))
    again, other = epoch(augmented("flip", "crop")), epoch(augmented("flip", "crop"), seed=1)
    for (x, y), (images, labels), (same, _) in zip(plain, changed, again, strict=True):
        assert torch.equal(labels, y)
        assert images.shape == x.shape
        assert not torch.equal(images, x)
        assert torch.equal(images, same)
    assert not torch.equal(changed[0][0], other[0][0])


def test_tests_stay_as_they_are() -> None:
    for one, other in zip(
        client_data().test_batches(7), augmented("flip").test_batches(7), strict=True
    ):
        assert torch.equal(one[0], other[0])


def test_a_participants_choice_wins() -> None:
    run = ClientSection(dataset="digits", augmentation="flip", num_partitions=5)
    assert load(run).augmentation == ("flip",)
    node = NodeConfig.parse({"partition-id": 0, "augmentation": "crop, flip"})
    data = load(node.client_section(run))
    assert data.augmentation == ("crop", "flip")
    assert epoch(data)[0][0].shape == (16, 1, 32, 32)


@pytest.mark.parametrize("text", ["flipp", "flip,none", ""])
def test_an_unknown_name_is_refused(text: str) -> None:
    known = "unknown augmentation .*Known: crop, flip"
    with pytest.raises(ConfigError, match=f"run config: augmentation.*{known}"):
        RunConfig.parse({"augmentation": text})
    with pytest.raises(ConfigError, match=f"node config: augmentation.*{known}"):
        NodeConfig.parse({"client-id": "a", "augmentation": text})


OWN = """
import numpy as np
import torch
from torchvision.transforms import v2

turn = v2.Compose([v2.RandomRotation(30), v2.RandomHorizontalFlip()])


def turned(pictures):
    return turn(pictures) if np.random.random() < 2 else pictures


def as_floats(pictures):
    return pictures.float()


def noisy(rows):
    return rows + torch.randn_like(rows)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_turns.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("own")
def test_a_function_of_ones_own_changes_what_is_trained_on() -> None:
    """Other pictures in every epoch, the same from the same seed; whatever else draws meanwhile."""
    run = ClientSection(dataset="digits", num_partitions=5)
    node = NodeConfig.parse({"client-id": "a", "augmentation": "own_turns:turned"})
    plain, data = load(run), load(node.client_section(run))
    torch.manual_seed(5)
    first, state = epoch(data), torch.get_rng_state()
    torch.manual_seed(6)
    np.random.seed(6)
    again, other = epoch(data), epoch(data, seed=1)
    assert all(torch.equal(x, y) for a, b in zip(first, again, strict=True) for x, y in zip(a, b))  # noqa: B905
    assert not torch.equal(first[0][0], other[0][0])
    assert not torch.equal(first[0][0], epoch(plain)[0][0])
    assert torch.equal(first[0][1], epoch(plain)[0][1]), "labels stay with their pictures"
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state()), "nobody else's draws are touched"


@pytest.mark.usefixtures("own")
def test_a_function_gives_back_what_it_got() -> None:
    section = ClientSection(dataset="digits", num_partitions=5, augmentation="own_turns:as_floats")
    with pytest.raises(
        ModelError, match=r"same shape and type, torch.uint8 \(16, 1, 32, 32\); got"
    ):
        epoch(load(section))
    with pytest.raises(ModelError, match="augmentation = 'own_turns:missing'"):
        load(section.model_copy(update={"augmentation": "own_turns:missing"}))


@pytest.mark.usefixtures("own")
def test_tables_have_a_function_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = "import numpy as np\n\ndef rows():\n    x = np.arange(120, dtype=np.float32)\n"
    rows += "    return x.reshape(40, 3), np.arange(40) % 2\n"
    (tmp_path / "own_rows.py").write_text(rows)
    section = ClientSection(dataset="own_rows:rows", partition="none", num_partitions=1,
                            augmentation="own_turns:noisy")  # fmt: skip
    examples, _ = epoch(load(section))[0]
    assert examples.dtype == torch.float32
    assert (examples != examples.round()).any()
