"""`mh-pfedhn new NAME`: a folder to start from, with code that runs as it stands."""

from __future__ import annotations

import argparse
import json
from importlib import resources
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files import replace_file
from experiments.console import make_console, say

COPIED = ("my_site.py", "my_site.toml", "simulate.toml")
NOTEBOOK = "tutorial.ipynb"
CELLS: tuple[tuple[str, str], ...] = (
    (
        "markdown",
        "# What is joining worth?\n\nTen participants share the data of `my_site.py`; half have "
        "its model, half another architecture. Each also trains alone, by the same recipe.",
    ),
    (
        "code",
        "from experiments.__main__ import main\n\n"
        'assert main(["run", "simulate.toml", "--output-dir", "run"]) == 0',
    ),
    (
        "markdown",
        "`accuracy_micro` is what participants predict with; `accuracy_alone` is without the "
        "federation.",
    ),
    (
        "code",
        "import json\nfrom pathlib import Path\n\n"
        'rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]\n'
        "for row in rows:\n"
        '    if "accuracy_micro" in row:\n'
        '        print(row["round"], f"{row[\'accuracy_micro\']:.3f}", '
        'f"{row[\'accuracy_alone\']:.3f}")',
    ),
    ("markdown", "The curves of the run, and a model of your own to predict with:"),
    (
        "code",
        "from PIL import Image\n\n"
        'with Image.open("run/curves.png") as opened:\n    picture = opened.copy()\n'
        "picture",
    ),
    (
        "code",
        "from client_app.personal import read_predictor\n\n"
        'model, about = read_predictor(Path("run/personal-models/0"))\n'
        'print(f"{about[\'test_accuracy\']:.3f} on {about[\'num_test\']} test examples")',
    ),
)  # fmt: skip


def add_new_parser(commands: Any) -> None:
    """Add `new` to the command line."""
    command = commands.add_parser("new")
    command.add_argument("folder", type=Path, metavar="NAME", help="a folder that is not there yet")
    command.set_defaults(command=run_new)


def run_new(args: argparse.Namespace) -> int:
    """Write the folder, and say what to do with it."""
    folder: Path = args.folder
    if folder.exists():
        raise DataError(f"{folder} is there already. Name a folder that is not.")
    folder.mkdir(parents=True)
    for name in COPIED:
        text = (resources.files("experiments.examples") / name).read_text(encoding="utf-8")
        replace_file(folder / name, text)
    replace_file(folder / NOTEBOOK, json.dumps(notebook(), indent=1))
    console = make_console()
    say(console, f"{folder} has a model and data that run as they stand; make them yours:")
    for command, purpose in (
        (f"cd {folder}", ""),
        ("mh-pfedhn run simulate.toml", "ten participants on this machine, two architectures"),
        ("mh-pfedhn join my_site.toml --check", "once an operator has sent you a bundle"),
        (f"jupyter lab {NOTEBOOK}", "the first, step by step"),
    ):
        say(console, f"  {command:<38}{purpose}".rstrip())
    return 0


def notebook() -> dict[str, Any]:
    """Return the tutorial as a Jupyter notebook (nbformat 4.5)."""
    cells: list[dict[str, Any]] = [
        {"id": f"cell-{number}", "cell_type": kind, "metadata": {}, "source": source}
        | ({"execution_count": None, "outputs": []} if kind == "code" else {})
        for number, (kind, source) in enumerate(CELLS)
    ]
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}
