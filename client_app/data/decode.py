"""Pictures and arrays to uint8 (channels, size, size).

Resizing is bilinear with antialiasing, to a square; a picture that is not square is squeezed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from common.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Only these parsers ever see a participant's bytes."""
GREY_MODES = {"1", "L", "LA", "I", "F"}
DEEP_MODES = {"I", "F"}
"""More than 8 bits: 16-bit integers, 32-bit integers, floats."""
_CHUNK = 512
_ORIENTATION = 0x0112  # EXIF tag
_BAD_PICTURE = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError),
    *(OverflowError, ZeroDivisionError, RecursionError, Image.DecompressionBombError),
)
"""What PIL's parsers raise."""
MOST_PIXELS = 50_000_000
"""Of a picture: a few hundred kilobytes may claim more than fits in memory."""

Pixels = NDArray[np.uint8]


Intensity = tuple[float, float]
"""What becomes 0 and what becomes 255."""


def decode_picture(
    data: bytes, *, channels: int, image_size: int, name: str, intensity: Intensity | None = None
) -> Pixels:
    """Decode an encoded picture to (channels, image_size, image_size); 1 channel grey, 3 RGB.

    What is transparent becomes white. `intensity` is for pictures with more than 8 bits. Raises
    DataError, with `name`, where the bytes are not a whole picture in one of `FORMATS`.
    """
    try:
        with _opened(data) as opened:
            turned = opened.getexif().get(_ORIENTATION, 1) != 1
            picture = ImageOps.exif_transpose(opened) if turned else opened
            picture = _eight_bit(_on_white(picture), intensity)
            picture = picture.convert("L" if channels == 1 else "RGB")
    except _BAD_PICTURE as error:
        raise DataError(
            f"{name} is not a picture that can be read ({error}). Formats: {', '.join(FORMATS)}. "
            "Remove the file or replace it."
        ) from error
    return resize_array(np.atleast_3d(np.asarray(picture, np.uint8)), image_size=image_size)


def _opened(data: bytes) -> Image.Image:
    """Read a picture's header; raise ValueError where it has more than `MOST_PIXELS`."""
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = picture.size
    if width * height > MOST_PIXELS:
        picture.close()
        raise ValueError(f"{width} x {height} pixels; at most {MOST_PIXELS:,} are read")
    return picture


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


def picture_kind(data: bytes) -> tuple[int, bool]:
    """Return 1 for a grey picture and 3 for any other, and whether it has more than 8 bits.

    From its header alone. One that cannot be opened counts as plain grey: decoding will report it.
    """
    try:
        with _opened(data) as picture:
            mode = picture.mode.split(";")[0]
            pages = getattr(picture, "n_frames", 1) if picture.format == "TIFF" else 1
            if pages > 1:
                raise DataError(
                    f"a TIFF has {pages} pages, of which one would be read. Write a "
                    "picture a page, or return volumes from a function, float32 (N, 1, D, H, W)."
                )
            return 1 if mode in GREY_MODES else 3, mode in DEEP_MODES
    except _BAD_PICTURE:
        return 1, False


def picture_range(data: bytes, name: str) -> Intensity:
    """Return the least and the largest value of a grey picture.

    Raises DataError, with `name`, where it cannot be read, or a value is no number.
    """
    try:
        with _opened(data) as picture:
            values = np.asarray(picture, dtype=np.float32)
    except _BAD_PICTURE as error:
        raise DataError(f"{name} is not a picture that can be read ({error}).") from error
    if not np.isfinite(values).all():
        raise DataError(
            f"{name} has values that are no numbers (NaN or infinite). Mend or remove it."
        )
    return float(values.min()), float(values.max())


def fill(images: NDArray[Any], read_example: Callable[[int], NDArray[Any]]) -> None:
    """Write every example into `images` (N, ...), on a few threads."""

    def fill_span(start: int) -> None:
        for index in range(start, min(start + _CHUNK, len(images))):
            images[index] = read_example(index)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for done in [pool.submit(fill_span, i) for i in range(0, len(images), _CHUNK)]:
                done.result()
        finally:  # after an error, do not decode the rest
            pool.shutdown(cancel_futures=True)


def _on_white(picture: Image.Image) -> Image.Image:
    """Put what is transparent on white, as a viewer shows it."""
    if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
        return picture
    shown = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")


def _eight_bit(picture: Image.Image, intensity: Intensity | None) -> Image.Image:
    """Scale grey with more than 8 bits to 8; PIL's own conversion would clip it."""
    if picture.mode.split(";")[0] not in DEEP_MODES:
        return picture
    low, high = intensity or (0.0, 65535.0)
    values = (np.asarray(picture, dtype=np.float32) - low) / (high - low)
    return Image.fromarray(np.rint(values.clip(0, 1) * 255).astype(np.uint8))
