"""What `mh-pfedhn join` tries of a participant's data and model before it joins."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.config import ClientSection, NodeConfig, RunConfig
from common.errors import ModelError, RunError, listing
from experiments.deploy.settings import JoinSettings

if TYPE_CHECKING:
    from torch import Tensor

    from client_app.data.examples import ClientData
    from client_app.models.instances import Instance
    from experiments.deploy.contract import Contract

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
        hints.append(
            "- values are large: scale columns to mean 0 and standard deviation 1"
            if data.input_dtype.is_floating_point
            else "- ids are large: an embedding needs a row for each"
        )
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
    if not named and 2 * len(missing) > len(names) and len(names) > 10:
        hints = [
            f"- {len(missing)} of {len(names)} classes have none: are these numbers to predict? "
            '{"inputs": ..., "labels": ..., "target": "numbers"}. Or ids? '
            "np.unique(labels, return_inverse=True)[1]"
        ]
    elif not named and not several and counts[0] == 0 and not (test == 0).any():
        hints.append("- nor to test of class 0: do your labels start at 1? They count from 0")
    few = zip(names[:12], counts, strict=False)
    shown = ", ".join(f"{name} {count}" if named else str(count) for name, count in few)
    what = "labels, each there or not" if several else "classes"
    return f"{data.num_classes} {what} ({shown}{', ...' * (len(counts) > 12)} to train)", hints


def check_contract(trial: Trial) -> Finding:
    """Hold the data against what the federation's participants agree on."""
    contract: Contract = _needed(trial.settings.contract, "contract")
    met = contract.require_met(_needed(trial.data, "data"))
    return Finding(met, contract.lifted(trial.settings.node))


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
        with _told_what_came(data, images):
            logits = logits_of(module, images, data.num_classes)
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
    epoch = f"an epoch of {len(batches)} batches: about {seconds * len(batches):.1f} s"
    return Finding(
        f"loss {losses[0]:.3f}{_weights_of(data)}; {epoch}",
        _remembers(instance, data, batches[0][0]),
    )


def _weights_of(data: ClientData) -> str:
    """Say what the classes weigh in the loss, where they do: a list may be in another order."""
    from client_app.data.losses import Weighted

    if not isinstance(data.loss, Weighted):
        return ""
    names = data.about.get("class_names") or range(data.num_classes)
    pairs = zip(names, data.loss.weights.tolist(), strict=True)
    return f", where weigh {listing((f'{name} {x:.3g}' for name, x in pairs), 12)}"


def check_common(trial: Trial) -> Finding:
    """Build the common model that the settings or the contract name, and run it."""
    import torch

    from client_app.models.instances import instance_of
    from client_app.participant import kind_for

    data: ClientData = _needed(trial.data, "data")
    name = NodeConfig.parse(trial.settings.node).global_model
    model = instance_of(kind_for(name, data, device=data.train_images.device)).model
    with torch.no_grad(), _told_what_came(data, data.train_images[:2]):
        model.module.eval()(data.normalise(data.train_images[:2]))
    return Finding(f"{name}, {model.num_parameters:,} parameters")


@contextmanager
def _told_what_came(data: ClientData, images: Tensor) -> Iterator[None]:
    """Say of an error of a model what it was given."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        came = f"{str(images.dtype)[6:]} {tuple(images.shape)}"
        if parts := data.about.get("inputs"):
            came = ", ".join(
                f"{name} {kind} {(len(images), *shape)}" for name, (kind, *shape) in parts.items()
            )
        hint = ""
        if "backward through the graph a second time" in str(error) or "hidden" in str(error):
            hint = " Does it keep a state of the batch before? Make it anew in forward."
        raise ModelError(f"the model got {came} and raised: {error}{hint}") from error


def _remembers(instance: Instance, data: ClientData, images: Tensor) -> str:
    """Warn of a model that keeps between batches what neither its weights nor its buffers have."""
    import torch

    from client_app.models.building import built
    from client_app.models.instances import seed_dropout

    module = instance.model.module.eval()
    with torch.no_grad(), _told_what_came(data, images):
        said, again = module(images), module(images[:1])
        same = torch.allclose(said[:1], again, rtol=1e-3, atol=1e-4)
        fresh = built(instance.kind, 1).to(images.device)
        seed_dropout(fresh, instance.generator)
        fresh.load_state_dict(module.state_dict(), strict=False)
        for name, buffer in fresh.named_buffers():
            buffer.copy_(dict(module.named_buffers())[name])
        same &= torch.allclose(fresh.eval()(images), said, rtol=1e-3, atol=1e-4)
    if same:
        return ""
    return (
        "- the same batch gives other outputs the second time, or in a model of the same weights: "
        "it keeps something that is neither parameter nor buffer (a hidden state, a running mean). "
        "Make it anew in forward, or register_buffer it and change it in place"
    )


def _unnamed(key: str, tried: str) -> str:
    return f"- your settings name no {key}: each run says which, {tried!r} by default"


def _needed(value: Any, name: str) -> Any:
    if value is None:
        raise RunError(f"not checked: needs the {name}, see above.")
    return value
