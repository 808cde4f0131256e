"""The labels that a participant's own function returns: classes, several labels, or numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client_app.data.source import CLASSES, LABELS, NUMBERS, TARGETS
from common.errors import DataError, listing, unknown_name

MOST_KINDS = 20
"""Of whole numbers among float labels, that might be classes: then it has to be said."""
SAY = 'return {"inputs": ..., "labels": ..., "target": "numbers"}'


def read_labels(labels: Any, count: int, target: str = "") -> NDArray[Any]:
    """Return labels of one of `TARGETS`: int64 (N,), bool or float32 (N, C).

    `target` says what they are; "": as their type and shape say. Raises DataError where they are
    none of these, or where it cannot be told which.
    """
    found = np.asarray(labels)
    if found.dtype.kind in "OUS" and found.shape == (count,):
        names = np.unique(found.astype(str))
        raise DataError(
            f"labels are texts, {listing(names, 6)}. Number them: np.unique(labels, "
            "return_inverse=True)[1], and set class-names to their names, in order"
        )
    if target and target not in TARGETS:
        raise DataError(unknown_name("target", target, TARGETS).removesuffix("."))
    if len(found) != count or found.ndim not in (1, 2) or found.dtype.kind not in "buif":
        raise DataError(_expected(found, count))
    if found.ndim == 2 and found.shape[1] == 0:
        raise DataError(_expected(found, count))
    target = target or _told(found)
    if target == CLASSES:
        return _classes(found, count)
    if not np.isfinite(found.astype(np.float64)).all():
        raise DataError("a label is no finite number (NaN or infinite). Leave such examples out")
    table = found.reshape(count, -1)
    if target == NUMBERS:
        return table.astype(np.float32)
    if not np.isin(table, (0, 1)).all():
        odd = table[~np.isin(table, (0, 1))][0]
        raise DataError(
            f"several labels are 0 or 1 each (N, C); got {found.dtype} {found.shape} with {odd:g}. "
            "One class an example: labels.ravel(). Unsure ones: decide, or leave them out"
        )
    return table.astype(bool)


def _told(labels: NDArray[Any]) -> str:
    """Say what labels are, by their type and shape; raise DataError where that is not clear."""
    if labels.dtype.kind == "f" and labels.ndim == 1:
        kinds = np.unique(labels)
        if len(kinds) <= MOST_KINDS and (kinds == np.round(kinds)).all():
            raise DataError(
                f"labels are {labels.dtype} {labels.shape}, with {len(kinds)} whole numbers. Are "
                f"they classes? labels.astype(int). Are they numbers to predict? {SAY}"
            )
        return NUMBERS
    if labels.ndim == 1:
        return CLASSES
    if labels.shape[1] > 1 and (labels.sum(1) == 1).all() and np.isin(labels, (0, 1)).all():
        raise DataError(
            f"labels {labels.dtype} {labels.shape} have a single 1 in every row. Are they a class "
            f"each? labels.argmax(1). Are they several labels? {SAY.replace('numbers', 'labels')}"
        )
    return NUMBERS if labels.dtype.kind == "f" else LABELS


def _classes(labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    if labels.ndim == 1 and labels.min(initial=0) < 0:
        raise DataError(
            f"a label is {labels.min():g}; classes count from 0: np.unique(labels, "
            "return_inverse=True)[1]"
        )
    whole = labels.dtype.kind in "bui" or (labels == np.round(labels)).all()
    if labels.shape != (count,) or not whole or labels.min(initial=0) < 0:
        raise DataError(_expected(labels, count))
    return labels.astype(np.int64)


def _expected(labels: NDArray[Any], count: int) -> str:
    return (
        f"labels must be integers from 0, one for each of the {count} examples, got {labels.dtype} "
        f"{labels.shape}; or several labels, bool ({count}, C); or numbers, floats ({count}[, C])"
    )


def scale_of(labels: Tensor, *, is_private: bool) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (C,) of numbers (N, C); nothing (0,) of other labels.

    The deviation of what does not vary is 1. Raises DataError where training is private: one
    example would change the labels of all.
    """
    if not labels.is_floating_point():
        return torch.empty(0), torch.empty(0)
    if is_private:
        raise DataError(
            "dp-noise cannot protect numbers to predict: they are trained on in units of their "
            "mean and spread, which all examples have made. Set dp-noise = 0."
        )
    std = labels.double().std(0, correction=0)
    return labels.double().mean(0).float(), torch.where(std > 0, std, 1.0).float()
