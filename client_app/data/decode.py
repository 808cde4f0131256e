"""Pictures and arrays to uint8 (channels, size, size).

Resizing is bilinear with antialiasing, to a square; a picture that is not square is squeezed.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
"""What becomes 0 and what becomes 255; where the first is the larger, pictures are inverted."""
SIXTEEN_BITS: Intensity = (0.0, 65535.0)
FEWEST_LEVELS, LEAST_SPREAD = 16, 64
"""Of 256 that become 0 to 255; and the part of a range that values have to span: 1 / 64, of 255
four."""


def decode_picture(
    data: bytes, *, channels: int, image_size: int, name: str, intensity: Intensity | None = None
) -> Pixels:
    """Decode an encoded picture to (channels, image_size, image_size); 1 channel grey, 3 RGB.

    What is transparent becomes white. `intensity` scales or inverts; None: 8 bits are as they are,
    and of 16 bits 0 to 65535 become 0 to 255. Raises DataError, with `name`, where the bytes are
    not a whole picture in one of `FORMATS`.
    """
    try:
        with _opened(data) as opened:
            turned = opened.getexif().get(_ORIENTATION, 1) != 1
            picture = ImageOps.exif_transpose(opened) if turned else opened
            picture = _on_white(picture)
            if is_deep := picture.mode.split(";")[0] in DEEP_MODES:  # PIL's own way would clip it
                picture = Image.fromarray(scaled(np.asarray(picture), intensity or SIXTEEN_BITS))
            picture = picture.convert("L" if channels == 1 else "RGB")
            pixels = np.atleast_3d(np.asarray(picture, np.uint8))
            if intensity and not is_deep:
                pixels = scaled(pixels, intensity)
            return resize_array(pixels, image_size=image_size)
    except _BAD_PICTURE as error:
        raise DataError(
            f"{name} is not a picture that can be read ({error}). Formats: {', '.join(FORMATS)}. "
            "Remove the file or replace it."
        ) from error


class _InFlight:
    """Pixels that all threads together decode at the moment: each costs up to 14 bytes."""

    def __init__(self, most: int) -> None:
        self._free, self._changed = most, threading.Condition()

    @contextmanager
    def of(self, count: int) -> Iterator[None]:
        """Wait for room for so many, and hold it."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


_IN_FLIGHT = _InFlight(2 * MOST_PIXELS)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Read a picture's header; raise ValueError where it has more than `MOST_PIXELS`."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels; at most {MOST_PIXELS:,} are read")
        with _IN_FLIGHT.of(width * height):
            yield picture


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


def scaled(values: NDArray[Any], intensity: Intensity) -> Pixels:
    """Scale values of any shape to 0 to 255; what lies outside becomes the nearer of the two."""
    first, last = intensity
    shares = (values.astype(np.float32) - np.float32(first)) / np.float32(last - first)
    found: Pixels = np.rint(shares.clip(0, 1) * 255).astype(np.uint8)
    return found


def require_spread(intensity: Intensity, values: Intensity | None) -> None:
    """Raise DataError where pictures would be all alike, or not as meant, by an intensity.

    `values` are the least and the largest of all; None of pictures with 8 bits.
    """
    low, high = sorted(intensity)
    said = "{:g}..{:g}".format(*intensity)
    if values is None:
        if low < 0 or high > 255 or high - low < FEWEST_LEVELS:
            raise DataError(
                f'intensity = "{said}", and the pictures have 8 bits, 0 to 255. Set intensity = '
                '"0..255" in your own file, or "255..0" where black and white are the other way.'
            )
        return
    if min(high, values[1]) - max(low, values[0]) < (high - low) / LEAST_SPREAD:
        raise DataError(
            f'intensity = "{said}", and values lie from {values[0]:g} to {values[1]:g}: they would '
            f'be all alike. Set intensity = "{values[0]:g}..{values[1]:g}" in your own file, or '
            "whatever range they are meant in."
        )
