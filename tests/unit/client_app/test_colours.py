"""Grey pictures among coloured ones, and coloured ones among grey ones."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client_app.data.colours import recoloured
from common.config import ClientSection
from common.errors import DataError
from tests.unit.client_app.pictures import load


def write_pictures(folder: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / label / f"{number}.png")


def section(folder: Path, channels: int) -> ClientSection:
    return ClientSection(
        dataset="folder", data_dir=str(folder), partition="none", num_partitions=1, image_size=8,
        channels=channels,
    )  # fmt: skip


def test_colours_become_grey_as_pillow_makes_them() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    wanted = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in pixels])
    found = recoloured(pixels.transpose(0, 3, 1, 2), 1)
    assert found.shape == (3, 1, 16, 16)
    assert np.abs(found[:, 0].astype(int) - wanted).max() <= 1


def test_grey_becomes_three_equal_channels_and_back() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    coloured = recoloured(grey, 3)
    assert coloured.shape == (4, 3, 8, 8)
    assert all(np.array_equal(coloured[:, i], grey[:, 0]) for i in range(3))
    assert np.array_equal(recoloured(coloured, 1), grey)
    assert recoloured(grey, 1) is grey


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_participants_pictures_have_the_channels_that_are_agreed_on(
    tmp_path: Path, mode: str, channels: int
) -> None:
    write_pictures(tmp_path, mode)
    plain, data = load(section(tmp_path, 0)), load(section(tmp_path, channels))
    assert data.in_channels == channels
    assert data.input_shape == (channels, 8, 8)
    assert (len(data.mean), len(data.std)) == (channels, channels)
    wanted = recoloured(plain.train_images.numpy(), channels)
    assert np.array_equal(data.train_images.numpy(), wanted)
    assert data.normalise(data.train_images).shape[1:] == (channels, 8, 8)


def test_other_channels_are_refused() -> None:
    with pytest.raises(DataError, match="there are pictures of 4 channels; grey"):
        recoloured(np.zeros((2, 4, 8, 8), np.uint8), 3)
