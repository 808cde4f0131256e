"""`mh-pfedhn export-partitions` and `import-results`: one partition, another library's methods.

The files are those that PFLlib and HtFLlib (github.com/TsingZhang/PFLlib, HtFLlib) read and write:
`train/I.npz` and `test/I.npz` for participant I, each one array `data` that holds a dict of `x`,
float32 (N, ...) as a model gets them, and `y`, int64 (N,); and `NAME.h5` with `rs_test_acc`, the
accuracy of every evaluation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.config.section import Scalar
from common.errors import ConfigError, DataError
from common.files import replace_file
from experiments.console import add_set_option, make_console, say

if TYPE_CHECKING:
    from torch import Tensor

    from client_app.data.examples import ClientData

PARTS = ("train", "validation", "test")
ACCURACY, LOSS = "rs_test_acc", "rs_train_loss"


def add_export_parser(commands: Any) -> None:
    """Add `export-partitions` to the command line."""
    command = commands.add_parser("export-partitions")
    command.add_argument("experiment", metavar="PRESET|FILE.toml", help="see `mh-pfedhn list`")
    command.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    command.add_argument("--seed", type=int, metavar="N", help="as of `run`")
    command.add_argument("--data-dir", metavar="DIR", help="local data instead of the hub")
    add_set_option(command, "any key of the run config")
    command.set_defaults(command=export_partitions)


def add_import_parser(commands: Any) -> None:
    """Add `import-results` to the command line."""
    command = commands.add_parser("import-results")
    command.add_argument("files", type=Path, nargs="+", metavar="FILE.h5", help="one for each seed")
    command.add_argument("out", type=Path, metavar="OUT", help="the folder that the runs go to")
    command.add_argument("--method", required=True, metavar="NAME", help="what tables call it")
    command.add_argument(
        "--eval-gap", type=int, default=1, metavar="N", help="rounds between two evaluations"
    )
    command.set_defaults(command=import_results)


def export_partitions(args: argparse.Namespace) -> int:
    """Write what each participant of a run would train, choose and test on."""
    import torch

    from client_app.data.examples import load_client_data
    from experiments.run.presets import Preset, resolve_paths

    if args.out.exists():
        raise DataError(f"{args.out} is there already. Name a folder that is not.")
    given: dict[str, Scalar] = {"data-dir": args.data_dir} if args.data_dir else {}
    given |= {"seed": args.seed} if args.seed is not None else {}
    preset = Preset.load(args.experiment).with_settings(args.set)
    config = preset.with_config(resolve_paths(given, base=Path.cwd())).config
    clients = [
        load_client_data(
            config.client, partition_id=i, seed=config.run.seed, device=torch.device("cpu")
        )
        for i in range(config.client.num_partitions)
    ]
    for number, data in enumerate(clients):
        _write(args.out, number, data)
    facts = {
        "num_clients": len(clients),
        "num_classes": clients[0].num_classes,
        "partition": config.client.partition,
        "alpha": config.client.dirichlet_alpha,
        "seed": config.run.seed,
        "Size of samples for labels in clients": [_counts(data) for data in clients],
    }
    replace_file(args.out / "config.json", json.dumps(facts, indent=2))
    count = sum(data.num_train for data in clients)
    say(make_console(), f"{len(clients)} participants with {count:,} examples to train: {args.out}")
    return 0


def import_results(args: argparse.Namespace) -> int:
    """Write a run folder for each result file, which `compare` and `report` read as any other."""
    for seed, file in enumerate(args.files, start=1):
        accuracies, losses = _results(file)
        rows = [
            {"round": 1 + i * args.eval_gap, "accuracy_micro": accuracy}
            | ({"train_loss": losses[i]} if i < len(losses) else {})
            for i, accuracy in enumerate(accuracies)
        ]
        folder = args.out / file.stem
        if folder.exists():
            raise DataError(f"{folder} is there already. Remove it, or name another folder.")
        folder.mkdir(parents=True)
        summary = {
            "status": "completed",
            "method": args.method,
            "last": rows[-1],
            "rounds": rows[-1]["round"],
        }
        replace_file(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        config = {"method": args.method, "seed": seed}
        replace_file(folder / "config.json", json.dumps(config, indent=2))
        replace_file(folder / "summary.json", json.dumps(summary, indent=2))
        say(make_console(), f"{len(rows)} evaluations, the last {accuracies[-1]:.4f}: {folder}")
    return 0


def _write(out: Path, number: int, data: ClientData) -> None:
    for part in PARTS:
        inputs: Tensor = getattr(data, f"{part}_images")
        if not len(inputs):
            continue
        content = {
            "x": data.normalise(inputs).float().contiguous().numpy(),
            "y": getattr(data, f"{part}_labels").numpy(),
        }
        place = out / part
        place.mkdir(parents=True, exist_ok=True)
        # these libraries read a pickled dict; here it is written, and never read
        np.savez_compressed(place / f"{number}.npz", data=np.array(content, dtype=object))


def _counts(data: ClientData) -> list[list[int]]:
    labels, counts = np.unique(data.train_labels.numpy(), return_counts=True)
    return [[int(label), int(count)] for label, count in zip(labels, counts, strict=True)]


def _results(file: Path) -> tuple[list[float], list[float]]:
    """Return accuracy and loss of every evaluation; raise DataError where there are none."""
    try:
        import h5py
    except ImportError as error:
        raise ConfigError(f"result files need `pip install h5py` ({error}).") from error
    try:
        with h5py.File(file, "r") as opened:
            found = [[float(x) for x in opened[k]] if k in opened else [] for k in (ACCURACY, LOSS)]
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{file} is no result file: {error}") from error
    if not found[0]:
        raise DataError(f"{file} has no {ACCURACY}: the accuracies of a run.")
    return found[0], found[1]
