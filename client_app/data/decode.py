"""Pictures and arrays to uint8 (channels, size, size).

Resizing is bilinear with antialiasing, to a square; a picture that is not square is squeezed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from common.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Only these parsers ever see a participant's bytes."""
GREY_MODES = {"1", "L", "I", "F"}
_CHUNK = 512
_ORIENTATION = 0x0112  # EXIF tag
_BAD_PICTURE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

Pixels = NDArray[np.uint8]
ReadExample = Callable[[int], Pixels]


def decode_picture(data: bytes, *, channels: int, image_size: int, name: str) -> Pixels:
    """Decode an encoded picture to (channels, image_size, image_size); 1 channel grey, 3 RGB.

    Raises DataError, with `name`, where the bytes are not a whole picture in one of `FORMATS`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            turned = opened.getexif().get(_ORIENTATION, 1) != 1
            picture = ImageOps.exif_transpose(opened) if turned else opened
            picture = _eight_bit(picture).convert("L" if channels == 1 else "RGB")
    except _BAD_PICTURE as error:
        raise DataError(
            f"{name} is not a picture that can be read ({error}). Formats: {', '.join(FORMATS)}. "
            "Remove the file or replace it."
        ) from error
    return resize_array(np.atleast_3d(np.asarray(picture, np.uint8)), image_size=image_size)


def resize_array(pixels_hwc: Pixels, *, image_size: int) -> Pixels:
    """Resize (H, W, channels), any number of channels, to (channels, image_size, image_size)."""
    pixels, size = pixels_hwc.transpose(2, 0, 1), (image_size, image_size)
    if pixels.shape[1:] == size:
        return pixels
    resized = [
        Image.fromarray(channel).resize(size, Image.Resampling.BILINEAR)
        for channel in np.ascontiguousarray(pixels)
    ]
    return np.stack([np.asarray(channel) for channel in resized])


def picture_channels(data: bytes) -> int:
    """Return 1 for a grey picture and 3 for any other, from its header alone.

    A picture that cannot be opened counts as 1: decoding will report it by name.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return 1 if picture.mode.split(";")[0] in GREY_MODES else 3
    except _BAD_PICTURE:
        return 1


def fill(images: Pixels, read_example: ReadExample) -> None:
    """Write every example into `images` (N, channels, size, size), on a few threads."""

    def fill_span(start: int) -> None:
        for index in range(start, min(start + _CHUNK, len(images))):
            images[index] = read_example(index)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for done in [pool.submit(fill_span, i) for i in range(0, len(images), _CHUNK)]:
                done.result()
        finally:  # after an error, do not decode the rest
            pool.shutdown(cancel_futures=True)


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; PIL's own conversion would clip it."""
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.int64)
    return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
