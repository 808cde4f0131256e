"""Grey pictures among coloured ones: all are brought to one number of channels.

What participants train together needs inputs that are alike. A grey picture becomes a coloured one
of three equal channels, a coloured one grey by its luma (ITU-R BT.601).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client_app.data.cache import DecodedDataset
from common.errors import DataError

GREY, COLOURED = 1, 3
LUMA = (0.299, 0.587, 0.114)
_ROWS, MOST_LOOKED_AT = 256, 4096

Pixels = NDArray[np.uint8]


def recoloured(pictures: Pixels, channels: int) -> Pixels:
    """Return uint8 pictures (N, C, H, W) with so many channels; raise DataError where C is odd."""
    has = pictures.shape[1]
    if has == channels:
        return pictures
    if {has, channels} != {GREY, COLOURED}:
        raise DataError(
            f"channels = {channels}: there are pictures of {has} channels; grey (1) and coloured "
            "ones (3) become each other. Return others as floats (N, channels, H, W)."
        )
    if has == GREY:
        return np.repeat(pictures, COLOURED, axis=1)
    found = np.empty((len(pictures), GREY, *pictures.shape[2:]), np.uint8)
    weights = np.array(LUMA, np.float32)
    for start in range(0, len(pictures), _ROWS):  # floats of all of them would fill the memory
        some = pictures[start : start + _ROWS].astype(np.float32)
        found[start : start + _ROWS, 0] = np.rint(np.einsum("nchw,c->nhw", some, weights))
    return found


@dataclass(frozen=True)
class Recoloured:
    """The pictures of a data set with another number of channels, each made when it is asked for.

    Stands in the place of an array (N, channels, H, W), of which rows are taken.
    """

    pictures: Pixels
    channels: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array: (N, channels, H, W)."""
        return len(self.pictures), self.channels, *self.pictures.shape[2:]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the array: uint8."""
        return self.pictures.dtype

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, rows: Any) -> Pixels:
        return recoloured(self.pictures[rows], self.channels)


def border(pictures: Tensor) -> float:
    """Return the median of the outermost pixels of uint8 pictures (N, C, H, W), 0 to 255."""
    x = pictures[:MOST_LOOKED_AT].float().mean(1)
    edges = [x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]]
    return float(torch.cat(edges, 1).median())


def outside(pictures: Tensor) -> float:
    """Return which part of the values of uint8 pictures is 0 or 255: at the ends of their range."""
    x = pictures[:MOST_LOOKED_AT]
    return float(((x == 0) | (x == 255)).float().mean())


def with_channels(dataset: DecodedDataset, channels: int) -> DecodedDataset:
    """Return a data set with pictures of so many channels; 0, or no pictures: as it is.

    Raises DataError where they cannot be brought to them.
    """
    if channels in (0, dataset.in_channels) or not dataset.mean:
        return dataset
    images: Any = Recoloured(dataset.images, channels)
    images[:0]  # raises where they cannot be
    mean, std = (fmean(dataset.mean),) * channels, (fmean(dataset.std),) * channels
    return replace(dataset, images=images, mean=mean, std=std)
