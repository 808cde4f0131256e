"""`mh-pfedhn model`: what a participant owns, used without any code of its own."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from common.errors import DataError, MHpFedHNError, ModelError, listing
from common.files import PRIVATE, printable, private_folder, replace_file
from experiments.console import make_console, say
from experiments.deploy.predictions import admit_code, chosen, evaluate, predict

if TYPE_CHECKING:
    from client_app.shelf import Version

BATCH = 64
Batches = Iterable[NDArray[Any]]


def add_model_parser(commands: Any) -> None:
    """Add `model list|export|evaluate|predict` to the command line."""
    command = commands.add_parser("model")
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
        if name == "export":
            action.add_argument("--onnx", action="store_true", help="its program as ONNX too")
        if name != "list":
            action.add_argument(
                "--code", type=Path, metavar="FOLDER", help="with your module, if it is your model"
            )
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
        names = (row["federation"], str(row["round"]), row["which"], *shares, row["folder"])
        table.add_row(*(escape(printable(name)) for name in names))
    make_console(wide=True).print(table)
    return 0


def export(args: argparse.Namespace) -> int:
    """Copy a model's weights, and write its description and its program anew.

    A state folder may come from anybody. A program that lies in it may hold code, which torch runs
    when it is loaded: it is neither read nor copied.
    """
    from client_app.frozen import FROZEN, make_whole
    from client_app.personal import ABOUT_FILES, TEST_ROWS, how_to_load, how_to_run, read_predictor
    from client_app.program import save_onnx, save_program
    from client_app.store import COMMON_MODEL, OWN_MODEL, PERSONAL_MODEL

    found, out = chosen(args), args.out
    if out.exists():
        raise DataError(f"{out} is there already. Name a folder that is not.")
    admit_code(found.about, args.code)
    module, about = read_predictor(found.folder)
    blank = _blank(about)
    private_folder(out)
    weights = [f"{x}.safetensors" for x in (PERSONAL_MODEL, OWN_MODEL, COMMON_MODEL, FROZEN)]
    for path in (found.folder / name for name in (*weights, f"{TEST_ROWS}.npy")):
        if path.is_file() and not path.is_symlink():  # a link may lead to anything
            shutil.copyfile(path, out / path.name)
            (out / path.name).chmod(PRIVATE)
    whole = {k: x for k, x in about.items() if k not in ABOUT_FILES} | how_to_load(about)
    description, program = out / f"{PERSONAL_MODEL}.json", out / f"{PERSONAL_MODEL}.pt2"
    replace_file(description, json.dumps(whole, indent=2), mode=PRIVATE)
    make_whole(out)
    without = str(about.get("program_error") or "")
    if lost := about.get("not_in_state_dict"):
        without = f"its weights lack {listing(lost)}, which the one in {found.folder} may have"
    if not without:
        try:
            save_program((module, blank), program, lambda _: None, maker=program)
        except Exception as error:  # torch.export raises whatever it meets in a user's model
            without = f"{type(error).__name__}: {error}"
    told = {"program": None, "program_error": without[:2000]} if without else {}
    whole |= told or how_to_run(program.name, about)
    replace_file(description, json.dumps(whole, indent=2), mode=PRIVATE)
    console = make_console()
    say(console, f"round {found.server_round} of federation {found.federation} is in {out}")
    if args.onnx:
        try:
            save_onnx((module, blank), program.with_suffix(".onnx"))
        except MHpFedHNError:
            raise
        except Exception as error:  # as above
            raise ModelError(
                f"this model has no ONNX form: {type(error).__name__}: {error}"[:1000]
            ) from error
    if without:
        say(console, f"weights only, without the program {program.name}: {without}"[:1000])
    return 0


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


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _blank(about: dict[str, Any]) -> Any:
    import torch

    kind = "uint8" if about["mean"] else about["input"].partition(" ")[0]
    return torch.zeros(2, *about["input_shape"], dtype=getattr(torch, kind))
