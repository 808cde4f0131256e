"""`mh-pfedhn model`: what a participant owns, used without any code of its own."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from common.errors import DataError, listing
from common.files import printable
from experiments.console import make_console, say

if TYPE_CHECKING:
    from client_app.shelf import Version

BATCH = 64
Batches = Iterable[NDArray[Any]]


def add_model_parser(commands: Any) -> None:
    """Add `model list|export|evaluate|predict` to the command line."""
    command = commands.add_parser("model", help="a participant's models: list, export, use")
    actions = command.add_subparsers(title="actions", required=True, metavar="ACTION")
    for name, act, words, about in (
        ("list", list_models, (), "every federation's models, and what they reached"),
        ("export", export, ("OUT",), "write one as files to a new folder, its program with them"),
        ("evaluate", evaluate, ("DATA",), "test one on class folders of pictures, or on an .npz"),
        ("predict", predict, ("DATA", "OUT.csv"), "classify pictures of a folder, or an .npz"),
    ):
        action = actions.add_parser(name, help=about)
        action.add_argument("state", type=Path, metavar="STATE", help="the participant's folder")
        for word in words:
            kind = "data" if word == "DATA" else "out"
            action.add_argument(kind, type=Path, metavar=word)
        if name == "list":
            action.add_argument("--json", action="store_true", help="for programs")
        else:
            action.add_argument("--last", action="store_true", help="the newest, not the best")
            action.add_argument(
                "--federation", default="", metavar="ID", help="by default the newest"
            )
        action.set_defaults(command=act)


def list_models(args: argparse.Namespace) -> int:
    """Print a line for every version that is kept."""
    from client_app.shelf import Shelf

    shelf = Shelf(args.state)
    rows = [
        _row(v, is_last=v == versions[-1], is_best=v == shelf.best(name))
        for name in shelf.federations()
        for versions in [shelf.versions(name)]
        for v in versions
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        shelf.find("last")  # says why
    table = Table("federation", "round", "", "validation", "test", "alone", "gain", "folder")
    for row in rows:
        shares = [_share(row[key]) for key in ("validation", "test", "alone", "gain")]
        table.add_row(row["federation"], str(row["round"]), row["which"], *shares, row["folder"])
    make_console(wide=True).print(table)
    return 0


def export(args: argparse.Namespace) -> int:
    """Copy a model's files, and add its program where it has none yet."""
    from client_app.frozen import make_whole
    from client_app.personal import read_predictor, save_program
    from client_app.store import PERSONAL_MODEL

    found, out = _chosen(args), args.out
    if out.exists():
        raise DataError(f"{out} is there already. Name a folder that is not.")
    module, about = read_predictor(found.folder)
    shutil.copytree(found.folder, out)
    make_whole(out)
    program = out / f"{PERSONAL_MODEL}.pt2"
    if not program.exists():
        save_program((module, _blank(about)), program, lambda _: None)
    say(make_console(), f"round {found.server_round} of federation {found.federation} is in {out}")
    return 0


def predict(args: argparse.Namespace) -> int:
    """Write a line for every example: its file or row, its class, and each class's probability."""
    from client_app.data.own import pictures_below

    module, about = _opened(args)
    names, paths = _class_names(about), []
    if _is_pictures(about):
        paths = pictures_below(args.data)
        probabilities = _probabilities(module, _pictures(about, paths))
    else:
        probabilities = _probabilities(module, _arrays(args.data, about)[0])
    shown_as = [str(path.relative_to(args.data)) for path in paths]
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file" if paths else "row", "class", *(f"p({name})" for name in names)])
        for number, row in enumerate(probabilities):
            shown = [f"{p:.4f}" for p in row]
            example = shown_as[number] if shown_as else number
            writer.writerow([_no_formula(example), _no_formula(names[int(row.argmax())]), *shown])
    say(make_console(), f"{len(probabilities)} examples classified: {args.out}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Print accuracy, balanced accuracy, macro F1 and the confusion matrix on labelled data."""
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score

    from client_app.data.own import FolderSource

    module, about = _opened(args)
    names = _class_names(about)
    if _is_pictures(about):
        if {"train", "test"} <= {path.name for path in args.data.iterdir()}:
            args.data /= "test"
            say(make_console(), f"of the parts, {args.data}")
        classes = FolderSource(args.data.resolve(), tuple(names)).pictures()
        inputs = _pictures(about, [path for members in classes.values() for path in members])
        truth = np.repeat(np.arange(len(names)), [len(members) for members in classes.values()])
    else:
        inputs, truth = _arrays(args.data, about, labels=True)
    found = _probabilities(module, inputs).argmax(1)
    present = np.unique(truth)
    console = make_console()
    say(console, f"{len(truth)} examples of {len(present)} classes")
    say(console, f"accuracy          {(found == truth).mean():.3f}")
    say(console, f"balanced accuracy {balanced_accuracy_score(truth, found):.3f}")
    f1 = f1_score(truth, found, labels=present, average="macro", zero_division=0)
    say(console, f"macro F1          {f1:.3f}")
    table = Table("true \\ found", *(escape(printable(name)) for name in names))
    matrix = confusion_matrix(truth, found, labels=range(len(names)))
    for name, row in zip(names, matrix, strict=True):
        table.add_row(escape(printable(name)), *map(str, row))
    console.print(table)
    return 0


def _chosen(args: argparse.Namespace) -> Version:
    from client_app.shelf import Shelf

    return Shelf(args.state).find("last" if args.last else "best", args.federation)


def _opened(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return a model that maps uint8 pictures to logits, and its description."""
    from client_app.personal import read_predictor
    from client_app.shelf import DESCRIPTION

    found = _chosen(args)
    say(make_console(), f"round {found.server_round} of federation {found.federation}")
    if not args.federation and not args.last and (better := _better(args.state, found)):
        words = f"federation {better.federation} has a better one, of round {better.server_round}"
        say(make_console(), f"note: {words}: --federation {better.federation}")
    about = json.loads((found.folder / DESCRIPTION).read_text())
    sys.path += [folder for folder in about.get("code", ()) if folder not in sys.path]
    return read_predictor(found.folder)


def _better(state: Path, found: Version) -> Version | None:
    """Return the best model of another federation, where it is surely better on validation."""
    from client_app.shelf import Shelf

    shelf = Shelf(state)
    others = [shelf.best(name) for name in shelf.federations() if name != found.federation]
    best = max((v for v in others if v), key=lambda v: v.quality, default=None)
    return best if best and best.quality > found.quality else None


def _is_pictures(about: dict[str, Any]) -> bool:
    return bool(about["mean"])


def _probabilities(module: Any, inputs: Batches) -> np.ndarray:
    """Return the probability (N, C) of every class, of inputs as the model takes them."""
    import torch

    with torch.no_grad():
        found = [
            torch.softmax(module(torch.from_numpy(part)).double(), dim=1).numpy() for part in inputs
        ]
    return np.concatenate(found)


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


def _arrays(
    path: Path, about: dict[str, Any], *, labels: bool = False
) -> tuple[Batches, NDArray[np.int64]]:
    """Read inputs, and labels where they are wanted, of a file that numpy.savez has written."""
    wanted, shape = ("inputs", "labels") if labels else ("inputs",), tuple(about["input_shape"])
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in wanted}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. This model takes a file that numpy.savez has "
            f"written, with {listing(wanted)}; inputs (N, {', '.join(map(str, shape))})."
        ) from error
    inputs = arrays["inputs"]
    if inputs.shape[1:] != shape or not len(inputs):
        raise DataError(f"{path}: inputs {inputs.shape} must be (N, ...) with ... = {shape}.")
    truth = arrays.get("labels", np.zeros(len(inputs))).astype(np.int64)
    if truth.shape != (len(inputs),) or truth.min() < 0 or truth.max() >= about["num_classes"]:
        raise DataError(f"{path}: labels must be one of 0 to {about['num_classes'] - 1} an input.")
    inputs = inputs.astype(about["input"].partition(" ")[0])
    return (inputs[i : i + BATCH] for i in range(0, len(inputs), BATCH)), truth


def _class_names(about: dict[str, Any]) -> list[str]:
    return list(about.get("class_names") or map(str, range(about["num_classes"])))


def _row(version: Version, *, is_last: bool, is_best: bool) -> dict[str, Any]:
    about = version.about
    which = [name for name, it_is in (("last", is_last), ("best", is_best)) if it_is]
    return {
        "federation": version.federation,
        "round": version.server_round,
        "which": listing(which),
        "validation": about.get("validation_accuracy"),
        "test": about.get("test_accuracy"),
        "alone": about.get("accuracy_alone"),
        "gain": about.get("gain"),
        "folder": str(version.folder),
    }


def _no_formula(value: object) -> str:
    """Keep a spreadsheet from taking a name for a formula: a server may make up class names."""
    text = printable(str(value))
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _blank(about: dict[str, Any]) -> Any:
    import torch

    kind = "uint8" if _is_pictures(about) else about["input"].partition(" ")[0]
    return torch.zeros(2, *about["input_shape"], dtype=getattr(torch, kind))
