"""Pictures decoded: without loss, channels first, in the size asked for; a broken one is named."""

import numpy as np
import pytest

from client_app.data.decode import decode_picture, fill, resize_array
from common.errors import DataError
from tests.unit.client_app.pictures import encode, random_pixels


def test_decode_is_lossless_and_channels_first() -> None:
    pixels = random_pixels(1, 32, 32, 3)[0]
    decoded = decode_picture(encode(pixels), channels=3, image_size=32, name="x")
    assert np.array_equal(decoded, pixels.transpose(2, 0, 1))


def test_grey_becomes_rgb_and_rgb_grey_when_asked() -> None:
    grey = random_pixels(1, 32, 32)[0]
    assert decode_picture(encode(grey), channels=3, image_size=32, name="x").shape == (3, 32, 32)
    rgb = np.stack([grey] * 3, axis=-1)
    decoded = decode_picture(encode(rgb), channels=1, image_size=32, name="x")
    assert np.array_equal(decoded[0], grey)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = np.full((8, 8), 40_000, dtype=np.uint16)
    assert decode_picture(encode(deep), channels=1, image_size=8, name="x").max() == 40_000 >> 8


@pytest.mark.parametrize("size", [8, 28, 64])
def test_pictures_and_arrays_resize_alike(size: int) -> None:
    pixels = random_pixels(1, size, size, 3)[0]
    decoded = decode_picture(encode(pixels), channels=3, image_size=32, name="x")
    assert decoded.shape == (3, 32, 32)
    assert np.array_equal(decoded, resize_array(pixels, image_size=32))


def test_a_broken_picture_is_named() -> None:
    whole = encode(random_pixels(1, 32, 32, 3)[0])
    for data in (b"no picture", whole[: len(whole) // 2]):
        with pytest.raises(DataError, match=r"row 7 is not a picture that can be read"):
            decode_picture(data, channels=3, image_size=32, name="row 7")


def test_fill_reports_an_error_of_any_thread() -> None:
    def read(index: int) -> np.ndarray:
        if index == 1500:
            raise DataError("picture 1500")
        return np.zeros((1, 8, 8), np.uint8)

    with pytest.raises(DataError, match="picture 1500"):
        fill(np.zeros((4000, 1, 8, 8), np.uint8), read)
