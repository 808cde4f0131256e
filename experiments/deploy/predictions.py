"""`mh-pfedhn model predict` and `evaluate`: a participant's model on new examples.

Shapes: N examples, C outputs (classes, labels or numbers).
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from common.errors import DataError, listing
from common.files import is_shown_as_is, printable
from experiments.console import make_console, say

if TYPE_CHECKING:
    from client_app.shelf import Version

BATCH = 64
FEW_BYTES, MOST_RATIO = 1 << 28, 100
"""Bytes that arrays may have whatever their file has; beyond these, times those of their file."""
BINS = 15
"""Of the calibration error."""
Batches = Iterable[NDArray[Any]]
Floats = NDArray[np.float64]


def predict(args: argparse.Namespace) -> int:
    """Write a line for every example: its file or row, its class, and what the model says of it."""
    from client_app.data.own import pictures_below

    module, about = _opened(args)
    names, paths = _names(about), []
    if _is_pictures(about) and args.data.is_dir():
        paths = pictures_below(args.data)
        found = _predictions(module, _pictures(about, paths), about)
    else:
        found = _predictions(module, _batches(_inputs(args.data, about)), about)
    rows = [str(path.relative_to(args.data)) for path in paths] or map(str, range(len(found)))
    target = about["target"]
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = names if target == "numbers" else [f"p({name})" for name in names]
        classed = ["class"] if target == "classes" else []
        writer.writerow(["file" if paths else "row", *classed, *map(_no_formula, columns)])
        for example, row in zip(rows, found, strict=True):
            shown = [f"{value:.6g}" if target == "numbers" else f"{value:.4f}" for value in row]
            named = [names[int(row.argmax())]] if classed else []
            writer.writerow([*map(_no_formula, (example, *named)), *shown])
    say(make_console(), f"{len(found)} examples predicted: {args.out}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Print what the model reaches on labelled data, by the kind of its labels."""
    from client_app.data.labels import read_labels
    from client_app.data.own import FolderSource

    module, about = _opened(args)
    names = _names(about)
    if _is_pictures(about) and args.data.is_dir():
        if {"train", "test"} <= {path.name for path in args.data.iterdir()}:
            args.data /= "test"
            say(make_console(), f"of the parts, {args.data}")
        classes = FolderSource(args.data.resolve(), tuple(names)).pictures()
        inputs = _pictures(about, [path for members in classes.values() for path in members])
        truth = np.repeat(np.arange(len(names)), [len(members) for members in classes.values()])
    else:
        arrays = _inputs(args.data, about)
        inputs = _batches(arrays)
        truth = read_labels(_read(args.data, ["labels"])["labels"], len(arrays), about["target"])
        _require_fit(truth, names, args.data)
    found = _predictions(module, inputs, about)
    judge = {"classes": _of_classes, "labels": _of_labels, "numbers": _of_numbers}[about["target"]]
    console = make_console()
    for line in judge(found, truth, names):
        console.print(line)
    return 0


def _require_fit(truth: NDArray[Any], names: Sequence[str], path: Path) -> None:
    """Raise DataError where labels (N,) or (N, C) are not what a model says."""
    if truth.ndim == 1 and truth.max(initial=0) >= len(names):
        raise DataError(f"{path}: labels must be 0 to {len(names) - 1}; one is {truth.max()}.")
    if truth.ndim > 1 and len(names) != len(truth.T):
        raise DataError(f"{path}: labels {truth.shape} must be (N, {len(names)}).")


def _of_classes(found: Floats, truth: NDArray[Any], names: Sequence[str]) -> Iterator[str | Table]:
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, roc_auc_score

    chosen, present = found.argmax(1), np.unique(truth)
    yield f"{len(truth)} examples of {len(present)} classes"
    yield f"accuracy          {(chosen == truth).mean():.3f}"
    yield f"balanced accuracy {balanced_accuracy_score(truth, chosen):.3f}"
    f1 = f1_score(truth, chosen, labels=present, average="macro", zero_division=0)
    yield f"macro F1          {f1:.3f}"
    if len(present) > 1:  # one class against the rest, the mean over classes that are there
        areas = [roc_auc_score(truth == label, found[:, label]) for label in present]
        yield f"AUC               {np.mean(areas):.3f}"
    yield f"calibration error {calibration_error(found.max(1), chosen == truth):.3f}"
    table = Table("true \\ found", *(escape(printable(name)) for name in names))
    matrix = confusion_matrix(truth, chosen, labels=range(len(names)))
    for name, row in zip(names, matrix, strict=True):
        table.add_row(escape(printable(name)), *map(str, row))
    yield table


def _of_labels(found: Floats, truth: NDArray[Any], names: Sequence[str]) -> Iterator[str | Table]:
    from sklearn.metrics import f1_score, roc_auc_score

    chosen = found > 0.5
    yield f"{len(truth)} examples of {len(names)} labels"
    yield f"accuracy          {(chosen == truth).mean():.3f} (of labels)"
    yield f"all labels right  {(chosen == truth).all(1).mean():.3f} (of examples)"
    yield f"calibration error {calibration_error(found.ravel(), truth.ravel()):.3f}"
    table = Table("label", "there", "found", "accuracy", "F1", "AUC")
    for name, p, said, real in zip(names, found.T, chosen.T, truth.T, strict=True):
        area = f"{roc_auc_score(real, p):.3f}" if 0 < real.sum() < len(real) else ""
        f1 = f1_score(real, said, zero_division=0)
        counts = (str(real.sum()), str(said.sum()))
        share = f"{(said == real).mean():.3f}"
        table.add_row(escape(printable(name)), *counts, share, f"{f1:.3f}", area)
    yield table


def _of_numbers(found: Floats, truth: NDArray[Any], names: Sequence[str]) -> Iterator[str | Table]:
    yield f"{len(truth)} examples of {len(names)} number(s)"
    table = Table("number", "mean", "R^2", "mean absolute error", "root mean squared error")
    for name, said, real in zip(names, found.T, truth.T.astype(np.float64), strict=True):
        errors, spread = said - real, ((real - real.mean()) ** 2).sum()
        explained = f"{1 - (errors**2).sum() / spread:.3f}" if spread else ""
        sizes = (np.abs(errors).mean(), np.sqrt((errors**2).mean()))
        shown = (f"{real.mean():.4g}", explained, *(f"{size:.4g}" for size in sizes))
        table.add_row(escape(printable(name)), *shown)
    yield table


def calibration_error(said: Floats, right: NDArray[np.bool_]) -> float:
    """Return the expected calibration error (Guo et al. 2017, equation 3), in 15 equal bins.

    `said` (N,) are probabilities, `right` (N,) whether it was so.
    """
    bins = np.minimum((said * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, said - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(said))


def chosen(args: argparse.Namespace) -> Version:
    """Return the version that a command line asks for."""
    from client_app.shelf import Shelf

    return Shelf(args.state).find("last" if args.last else "best", args.federation)


def _opened(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return a model that maps examples to what `_predictions` reads, and its description."""
    from client_app.personal import OTHER_WITH_WEIGHTS, read_predictor

    found = chosen(args)
    say(make_console(), f"round {found.server_round} of federation {found.federation}")
    if not args.federation and not args.last and (better := _better(args.state, found)):
        words = f"federation {better.federation} has a better one, of round {better.server_round}"
        say(make_console(), f"note: {words}: --federation {better.federation}")
    about = found.about
    admit_code(about, args.code)
    module, described = read_predictor(found.folder)
    if OTHER_WITH_WEIGHTS in str(about.get("program_error", "")):
        say(make_console(), f"note: it is not what was trained: {about['program_error']}"[:1000])
    return module, {"target": "classes", **described}


def admit_code(about: dict[str, Any], code: Path | None) -> None:
    """Let a model's own code be imported from a folder that was named, or from what is installed.

    A description may come from anybody: it names code and does not get to have it run, and no
    program, which is what `__main__` is. Raises DataError where the code is neither.
    """
    if code is not None:
        sys.path.append(str(code.resolve()))
    for name in (about["model"], about.get("common_model") or ""):
        module, own, _ = name.partition(":")
        is_installed = own and importlib.util.find_spec(module.partition(".")[0]) is not None
        if own and (not is_installed or "__main__" in module):
            where = listing(about.get("code", ["the participant's folder"]))
            raise DataError(
                f"this model is built by code of its participant's, {name}, which was in {where}. "
                "It is run where you name its folder: --code FOLDER."
            )


def _better(state: Path, found: Version) -> Version | None:
    """Return the best model of another federation, if it is surely better on the same examples."""
    from client_app.shelf import Shelf

    shelf = Shelf(state)
    others = [shelf.best(name) for name in shelf.federations() if name != found.federation]
    same = (v for v in others if v and v.examples == found.examples)
    best = max(same, key=lambda v: v.quality, default=None)
    return best if best and best.quality > found.quality else None


def _is_pictures(about: dict[str, Any]) -> bool:
    return bool(about["mean"])


def _predictions(module: Any, inputs: Batches, about: dict[str, Any]) -> Floats:
    """Return probabilities or numbers (N, C), of inputs as the model takes them."""
    import torch

    with torch.no_grad():
        outputs = torch.cat([module(torch.from_numpy(part)).double() for part in inputs])
    if about["target"] == "classes":
        outputs = outputs.softmax(1)
    elif about["target"] == "labels":
        outputs = outputs.sigmoid()
    found: Floats = outputs.numpy()
    return found


def _pictures(about: dict[str, Any], paths: Sequence[Path]) -> Batches:
    """Yield pictures in batches, read as in training."""
    from client_app.data.decode import decode_picture

    if not paths:
        raise DataError("there is no picture to classify in that folder.")
    settings = {
        "channels": about["in_channels"],
        "image_size": about["image_size"],
        "intensity": tuple(about["intensity"]) if "intensity" in about else None,
    }
    for start in range(0, len(paths), BATCH):
        part = paths[start : start + BATCH]
        read = [decode_picture(path.read_bytes(), name=str(path), **settings) for path in part]
        yield np.stack(read)


def _inputs(path: Path, about: dict[str, Any]) -> NDArray[Any]:
    """Read inputs (N, ...) of a file that numpy.savez has written; several have their names."""
    from client_app.data.colours import recoloured
    from client_app.data.decode import resize_array, scaled
    from client_app.data.several import packed

    parts, shape = about.get("inputs", {}), tuple(about["input_shape"])
    arrays = _read(path, [*parts] or ["inputs"])
    inputs, found = packed(arrays if parts else arrays["inputs"])
    is_raw = inputs.dtype != np.uint8 or "values" not in about  # else they were scaled already
    if _is_pictures(about) and "intensity" in about and is_raw:
        inputs = scaled(inputs, tuple(about["intensity"]))
    if _is_pictures(about) and inputs.dtype == np.uint8 and inputs.ndim in (3, 4):
        pixels = inputs.reshape(*inputs.shape[:3], -1)
        sized = [resize_array(one, image_size=about["image_size"]) for one in pixels]
        inputs = recoloured(np.stack(sized), about["in_channels"]) if sized else inputs
    if found != parts or inputs.shape[1:] != shape or not len(inputs):
        wanted = parts or {"inputs": [*shape]}
        raise DataError(f"{path} must be (N, ...) of {wanted}; it has {_shapes(arrays)}.")
    return inputs.astype(np.uint8 if _is_pictures(about) else about["input"].partition(" ")[0])


def _read(path: Path, wanted: Sequence[str]) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            unpacked = sum(part.file_size for part in file.zip.infolist())
            if unpacked > max(FEW_BYTES, MOST_RATIO * path.stat().st_size):
                raise ValueError(f"it unpacks to {unpacked:,} bytes")
            return {name: file[name] for name in wanted}
    except Exception as error:  # whatever a file that is none makes numpy and zipfile raise
        raise DataError(
            f"{path} cannot be read: {error}. This model takes a file that numpy.savez has "
            f"written, with {listing(wanted)}."
        ) from error


def _shapes(arrays: dict[str, NDArray[Any]]) -> str:
    return listing([f"{name} {x.dtype} {x.shape}" for name, x in arrays.items()])


def _batches(inputs: NDArray[Any]) -> Batches:
    return (inputs[start : start + BATCH] for start in range(0, len(inputs), BATCH))


def _names(about: dict[str, Any]) -> list[str]:
    return list(about.get("class_names") or map(str, range(about["num_classes"])))


def _no_formula(value: str) -> str:
    """Keep a spreadsheet from taking a name for a formula: a server may make up class names."""
    text = printable(value).replace(";", ",")
    return text if is_shown_as_is(text) or not text else f"'{text}"
