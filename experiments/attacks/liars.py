"""What a few participants that lie can do to the honest ones: whole runs, with and without them.

The same participants, data and seed each time; the last ones of the federation stay away from the
first run, and lie in all the others. What counts is the accuracy of the honest ones.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, Context, Message
from rich.table import Table

from client_app.app import app
from common.compression import Float32
from common.config import RunConfig
from common.errors import ConfigError, RunError, unknown_name
from common.log import logger
from common.messages import GLOBAL_DELTA, TRAIN
from common.records import ARRAYS
from experiments.console import make_console
from experiments.run.engines.inprocess import run_inprocess, simulated_nodes
from experiments.run.presets import Preset
from server_app.clients import GLOBAL_ID
from server_app.hypernet.groups import num_chunks
from server_app.hypernet.kernel import KernelGroup, KernelNetwork

Lie = Callable[[Float32, Sequence[Float32], KernelGroup], Float32]
"""Makes of a liar's own delta (P,), of the newest ones (P,) of honest participants with as many
parameters, and of what the seed tells of their group, what is sent (P,)."""

JUST_ACCEPTED = 9_990.0
"""A norm below `max-delta-norm` as it is by default."""
TAIL = 3072
"""Entries at the end of a delta by which the kernel rule tells who is like whom."""


def _scaled(x: Float32, norm: float) -> Float32:
    return (x * (norm / max(float(np.linalg.norm(x)), 1e-12))).astype(np.float32)


def _noise(own: Float32, honest: Sequence[Float32], _: KernelGroup) -> Float32:
    """Draw other noise in every round, for every liar; the same in a run that is repeated."""
    seed = int.from_bytes(hashlib.sha256(own.tobytes()).digest()[:8], "big")
    draws = np.random.default_rng(seed).standard_normal(len(own))
    return _scaled(draws.astype(np.float32), JUST_ACCEPTED)


def _against(own: Float32, honest: Sequence[Float32], _: KernelGroup) -> Float32:
    """Undo what the honest learned, as far as they can be seen."""
    return _scaled(-np.mean(honest, axis=0) if honest else -own, JUST_ACCEPTED)


def _mimic(own: Float32, honest: Sequence[Float32], _: KernelGroup) -> Float32:
    """Look like somebody honest where likeness is measured, and undo its own training elsewhere."""
    lie = -5 * own
    if honest:
        lie[-TAIL:] = honest[-1][-TAIL:]
    return lie


def _alike(own: Float32, _: Sequence[Float32], group: KernelGroup) -> Float32:
    """Be as large as can be in one number of the group's sketch.

    Were others judged against a mean that this is in, all of them would look alike.
    """
    places, signs = group.places.numpy()[-len(own) :], group.signs.numpy()[-len(own) :]
    lie = np.zeros_like(own)
    lie[-len(places) :] = np.where(places == np.bincount(places).argmax(), signs, 0.0)
    return _scaled(lie, JUST_ACCEPTED)


LIES: Mapping[str, Lie] = {
    "flip": lambda own, *_: -own,
    "flip-5": lambda own, *_: -5 * own,
    "flip-100": lambda own, *_: -100 * own,
    "noise": _noise,
    "against": _against,
    "constant": lambda own, *_: _scaled(np.ones_like(own), JUST_ACCEPTED),
    "zero": lambda own, *_: np.zeros_like(own),
    "mimic": _mimic,
    "labels": lambda own, *_: own,
    "alike": _alike,
}
"""By name; "labels" trains honestly, on labels that are all wrong."""


@dataclass
class Federation:
    """A ClientApp for all: participants from number `first_liar` on lie when they have trained."""

    first_liar: int
    lie: str
    _newest: dict[tuple[str, str], Float32] = field(default_factory=dict)

    def __call__(self, message: Message, context: Context) -> Message:
        """Reply as the real app does; a liar then replaces every vector of a training reply."""
        who = str(context.node_config["partition-id"])
        lies = int(who) >= self.first_liar
        if lies and self.lie == "labels":
            return Message(_mislabelled(message, context), reply_to=message)
        reply = app(message, context)
        if message.metadata.message_type != TRAIN or not reply.has_content():
            return reply
        arrays = reply.content.array_records[ARRAYS]
        for name, array in list(arrays.items()):
            delta = array.numpy()
            if lies:
                alike = [
                    x for (n, _), x in self._newest.items() if n == name and len(x) == len(delta)
                ]
                group = sketching(name, len(delta), context.run_config)
                arrays[name] = Array(LIES[self.lie](delta, alike, group))
            else:
                self._newest.pop((name, who), None)  # so that the newest is the last
                self._newest[name, who] = delta
        return reply


def sketching(name: str, num_parameters: int, run_config: Mapping[str, Any]) -> KernelGroup:
    """Return the group that a vector of a message belongs to, as any participant can make it."""
    config = RunConfig.parse(run_config)
    chunks = num_chunks(num_parameters, config.hypernet.chunk_size)
    key = f"{chunks}-{GLOBAL_ID}" if name == GLOBAL_DELTA else str(chunks)
    return KernelNetwork(config.hypernet, seed=config.run.seed).make_group(key, torch.zeros(0))


def _mislabelled(message: Message, context: Context) -> Any:
    """Reply as a participant whose training labels are all wrong."""
    from client_app.participant import Participant, answer

    participant = Participant.open(context)
    data = participant.data
    wrong = data.num_classes - 1 - data.train_labels
    participant = replace(participant, data=replace(data, train_labels=wrong))
    return answer(participant, message.metadata.message_type, message.content)


def accuracy_of_honest(preset: Preset, liars: int, lie: str = "") -> float:
    """Run a preset whose last `liars` participants lie, or stay away; micro accuracy of the rest.

    A fraction, of the last round's test, of what each participant predicts with; 0 where the liars
    stopped the run.
    """
    num_clients = preset.engine.num_clients
    honest = num_clients - liars
    nodes = simulated_nodes(num_clients)
    with tempfile.TemporaryDirectory() as folder:
        config = preset.with_config(
            {"output-dir": f"{folder}/run", "checkpoint-every": 10**6}
        ).config
        present = nodes if lie else nodes[:honest]
        federation: Any = Federation(honest, lie)
        try:
            run_inprocess(config, present, client_app=federation, workers=preset.engine.workers)
        except RunError as error:
            logger.warning("stopped: %s", error)
            return 0.0
        with Path(folder, "run", "clients.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if int(row["client_id"]) < honest]
    return sum(int(r["correct"]) for r in rows) / sum(int(r["num_test"]) for r in rows)


def measure(args: argparse.Namespace) -> int:
    """Print the accuracy of the honest without liars and with each lie, in points."""
    console = make_console()
    for lie in args.lies:
        if lie not in LIES:
            raise ConfigError(unknown_name("lie", lie, LIES))
    preset = Preset.load(args.experiment).with_settings(args.set)
    if args.data_dir:
        preset = preset.with_config({"data-dir": str(Path(args.data_dir).resolve())})
    table = Table(
        "liars", "none", *args.lies, title=f"accuracy of {args.honest} honest participants"
    )
    for count in args.liars:
        whole = preset.with_engine({"num-clients": args.honest + count})
        found = [accuracy_of_honest(whole, count)]
        console.print(f"{count} away: {found[0]:.3f}")
        for lie in args.lies:
            found.append(accuracy_of_honest(whole, count, lie))
            console.print(f"{count} {lie}: {found[-1]:.3f} ({100 * (found[-1] - found[0]):+.1f})")
        table.add_row(str(count), *(f"{x:.3f}" for x in found))
    console.print(table)
    return 0
