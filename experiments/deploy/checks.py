"""What `mh-pfedhn join` checks before it starts anything, in the order in which things depend."""

from __future__ import annotations

import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from rich.console import Console

from common.config import ClientSection, NodeConfig, RunConfig
from common.errors import ConfigError, MHpFedHNError, ModelError, RunError
from experiments.console import say
from experiments.deploy.reach import UnreachableError, check_server
from experiments.deploy.settings import JoinSettings
from experiments.run.engines.processes import find_program

if TYPE_CHECKING:
    from client_app.data.examples import ClientData
    from client_app.models.instances import Instance
    from experiments.deploy.contract import Contract

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "bold red")}
MIN_FREE_BYTES = 1 << 30
LARGE = 30.0
"""Of a number that a network gets as it is."""


@dataclass(frozen=True)
class Finding:
    """What a check found; a warning does not keep anybody from joining."""

    detail: str
    warning: str = ""


@dataclass
class Trial:
    """The participant as it would train: filled by the checks, each using what came before."""

    settings: JoinSettings
    section: ClientSection
    data: ClientData | None = None
    instance: Instance | None = None


Check = Callable[[Trial], Finding]


def run_checks(settings: JoinSettings, console: Console, *, must_answer: bool) -> bool:
    """Run all checks and print the list; returns whether the participant can join.

    `must_answer` makes a server that cannot be reached a failure; a SuperNode that joins waits.
    """
    trial = Trial(settings, NodeConfig.parse(settings.node).client_section(RunConfig().client))
    checks: dict[str, Check] = {
        # peers of another minor version of Flower refuse each other
        "program": lambda _: Finding(
            f"{find_program('flower-supernode')}, Flower {version('flwr')}"
        ),
        "state folder": lambda t: check_folder(t.settings.folder),
        "key": lambda t: check_key(t.settings.key),
        "data": check_data,
        **({"contract": check_contract} if settings.contract else {}),
        "model": check_model,
        "training": check_training,
        "server": lambda t: check_reach(t.settings, must_answer=must_answer),
    }
    passed = [_run(name, check, trial, console) for name, check in checks.items()]
    return all(passed)


def _run(name: str, check: Check, trial: Trial, console: Console) -> bool:
    try:
        with console.status(f"checking {name}"):
            found = check(trial)
    except Exception as error:  # a participant's model may raise anything: that is the finding
        kind = "" if isinstance(error, MHpFedHNError) else f"{type(error).__name__}: "
        _say(console, "failed", name, f"{kind}{error}")
        return False
    _say(console, "warning" if found.warning else "ok", name, f"{found.detail} {found.warning}")
    return True


def _say(console: Console, status: str, name: str, detail: str) -> None:
    mark, style = MARKS[status]
    say(console, mark, style=style, end=" ")
    say(console, f"{name:<13}{detail.strip()}")


def check_reach(settings: JoinSettings, *, must_answer: bool) -> Finding:
    """Find the server; one that is away is a warning, unless it must answer."""
    try:
        found = check_server(settings.server, settings.certificate, settings.insecure)
    except UnreachableError as error:
        if must_answer:
            raise
        return Finding("", str(error))
    return Finding("", found) if settings.insecure else Finding(found)


def check_folder(folder: Path) -> Finding:
    """Check that the participant's folder can be written, is closed to others, and has room."""
    probe = folder / ".probe"
    try:
        probe.write_text("x")
        probe.unlink()
        folder.chmod(0o700)  # statistics and the final model say something about the data
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written: {error.strerror}. Choose another --state-dir."
        ) from error
    free = shutil.disk_usage(folder).free
    few = f"only {free / 1e6:.0f} MB are free" if free < MIN_FREE_BYTES else ""
    return Finding(f"{folder}, {free / 1e9:.1f} GB free", few)


def check_key(key: Path | None) -> Finding:
    """Check that the key is what Flower takes: a private key on a NIST curve, OpenSSH format."""
    make = "Make one: ssh-keygen -t ecdsa -b 384 -N '' -f KEY; send KEY.pub to the operator."
    if key is None:
        return Finding("none", "- fine only where the server asks for none (SuperNode auth off)")
    try:
        content = key.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key} cannot be read: {error.strerror}. {make}") from error
    if content.startswith((b"ssh-", b"ecdsa-")):
        raise ConfigError(f"{key} is the public key; give the private one (without .pub).")
    try:
        private = load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{key} is no private key in OpenSSH format without passphrase ({error}). {make}"
        ) from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{key} is a {type(private).__name__}; Flower needs ECDSA. {make}")
    mode = stat.S_IMODE(key.stat().st_mode)
    open_to = f"but others can read it (mode {mode:o}): chmod 600 {key}" if mode & 0o077 else ""
    return Finding(f"{key}, {private.curve.name}", open_to)


def check_data(trial: Trial) -> Finding:
    """Load the data as training would; say how many there are of each class."""
    from client_app.data.examples import load_client_data
    from client_app.data.own import listed
    from client_app.data.prepare import prepare_data
    from client_app.models.instances import pick_device
    from client_app.participant import split_seed_of
    from client_app.store import FolderState

    section, node = trial.section, NodeConfig.parse(trial.settings.node)
    prepare_data(section, seed=0, partition_id=node.partition_id)  # asks a function anew
    trial.data = data = load_client_data(
        section,
        partition_id=node.partition_id,
        seed=0,
        split_seed=split_seed_of(node, FolderState(trial.settings.folder)),
        device=pick_device(section.device),
    )
    shape, mean = "x".join(map(str, data.input_shape)), data.train_images.float().mean().item()
    inputs = f"{shape}, mean {mean:.0f} of 255" if data.is_pictures else f"{shape}, mean {mean:.3g}"
    labels, label_hints = _labels_of(data)
    hints = [] if node.dataset else [_unnamed("dataset", section.dataset)]
    if not data.is_pictures and float(data.train_images.float().abs().max()) > LARGE:
        hints.append("- values are large: scale columns to mean 0 and standard deviation 1")
    hints += label_hints
    if intensity := data.about.get("intensity"):
        hints.append("- values {:g} to {:g} become 0 to 255".format(*intensity))
    if left_out := data.about.get("left_out"):
        hints.append(f"- not read, for they are no pictures: {listed(left_out)}")
    return Finding(
        f"{data.num_train} to train, {len(data.validation_labels)} to validate and "
        f"{data.num_test} to test, {labels}, each {inputs}, on {data.train_images.device}",
        " ".join(hints),
    )


def _labels_of(data: ClientData) -> tuple[str, list[str]]:
    """Say what the labels are, and what may be wrong with them."""
    names = data.about.get("class_names") or [str(c) for c in range(data.num_classes)]
    named = "class_names" in data.about
    if len(data.label_std):
        spreads = zip(names[:12], data.label_mean.tolist(), data.label_std.tolist(), strict=False)
        shown = ", ".join(f"{name}: mean {m:.4g}, spread {s:.4g}" for name, m, s in spreads)
        return f"{data.num_classes} number(s) to predict ({shown})", []
    several = data.train_labels.ndim > 1
    train, test = data.train_labels, data.test_labels
    counts = (train.sum(0) if several else train.bincount(minlength=data.num_classes)).tolist()
    missing = [name for name, count in zip(names, counts, strict=True) if count == 0]
    kind = "label" if several else "class"
    hints = [f"- none to train of {kind} {', '.join(missing[:10])}"] if missing else []
    if not named and not several and counts[0] == 0 and not (test == 0).any():
        hints.append("- nor to test of class 0: do your labels start at 1? They count from 0")
    few = zip(names[:12], counts, strict=False)
    shown = ", ".join(f"{name} {count}" if named else str(count) for name, count in few)
    what = "labels, each there or not" if several else "classes"
    return f"{data.num_classes} {what} ({shown}{', ...' * (len(counts) > 12)} to train)", hints


def check_contract(trial: Trial) -> Finding:
    """Hold the data against what the federation's participants agree on."""
    contract: Contract = _needed(trial.settings.contract, "contract")
    return Finding(contract.require_met(_needed(trial.data, "data")))


def check_model(trial: Trial) -> Finding:
    """Build the model for these data; say its size, the one fact about it the server learns."""
    from client_app.models.instances import instance_of
    from client_app.models.registry import model_for_partition
    from client_app.participant import kind_for
    from client_app.personal import not_in_state_dict

    data, section = _needed(trial.data, "data"), trial.section
    node = NodeConfig.parse(trial.settings.node)
    first = max(node.partition_id, 0)  # a run says which; the first of its defaults is tried
    name = model_for_partition(section.models, first, section.num_partitions)
    device = data.train_images.device
    trial.instance = instance_of(kind_for(name, data, device=device, generate=node.generate))
    count, limit = trial.instance.model.num_parameters, RunConfig().hypernet.max_parameters
    hints = [] if node.model else [_unnamed("model", name)]
    if count > limit:
        hints.append(f"- more than the default limit of a server ({limit:,})")
    if lost := not_in_state_dict(trial.instance.model.module):
        hints.append(
            f"- plain weights lack {', '.join(lost)} (persistent=False); the program has it"
        )
    kept = sum(p.numel() for p in trial.instance.model.module.parameters()) - count
    stays = f" shared, {kept:,} stay at home" if kept else ""
    return Finding(f"{name}, {count:,} parameters{stays}", " ".join(hints))


def check_training(trial: Trial) -> Finding:
    """Train on a first and a last batch, then classify one picture: what breaks, breaks here."""
    import torch

    from client_app.training.loop import label_loss, logits_of, make_optimizer

    data: ClientData = _needed(trial.data, "data")
    instance: Instance = _needed(trial.instance, "model")
    node = NodeConfig.parse(trial.settings.node)
    module, training = instance.model.module.train(), node.training(RunConfig().training)
    optimizer = make_optimizer(instance.model.theta, training)
    batches = list(data.batches(training.batch_size, torch.Generator().manual_seed(0)))
    losses, started = [], time.monotonic()
    for images, labels in {0: batches[0], -1: batches[-1]}.values():
        try:
            logits = logits_of(module, images, data.num_classes)
        except RuntimeError as error:
            raise ModelError(
                f"the model got {str(images.dtype)[6:]} {tuple(images.shape)} and raised: {error}"
            ) from error
        loss = label_loss(logits, labels, training, data.loss)
        instance.model.backward(loss)
        optimizer.step(instance.model.gradient)
        instance.model.require_views()
        losses.append(float(loss.detach()))
    seconds = (time.monotonic() - started) / 2
    if not all(torch.isfinite(torch.tensor(losses))) or not instance.model.theta.isfinite().all():
        raise ModelError(
            f"the loss of the first batches is {losses}; expected finite numbers. Check the "
            "model's initialisation and the data for NaN."
        )
    if trial.section.dp_noise:
        from client_app.training.private import PrivateStep, require_private
        from common.accounting import require_accountant

        require_accountant()
        require_private(module)
        step = PrivateStep(instance.model, training, data.num_classes, trial.section.dp_clip)
        started = time.monotonic()
        step.summed(*batches[0])
        seconds = time.monotonic() - started
    with torch.no_grad():
        module.eval()(batches[0][0][:1])
    epoch = seconds * len(batches)
    return Finding(f"loss {losses[0]:.3f}; an epoch of {len(batches)} batches: about {epoch:.1f} s")


def _unnamed(key: str, tried: str) -> str:
    return f"- your settings name no {key}: each run says which, {tried!r} by default"


def _needed(value: Any, name: str) -> Any:
    if value is None:
        raise RunError(f"not checked: needs the {name}, see above.")
    return value
