"""The whole server in one checkpoint: what the method learned, registry, round, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.errors import CheckpointError
from common.log import logger
from server_app.clients import Registry
from server_app.methods.base import Method
from server_app.output.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

FOLDER = "checkpoint"


@dataclass(frozen=True)
class Progress:
    """Where a restored run stands."""

    server_round: int
    rows: list[dict[str, float]]
    client_rows: list[dict[str, Any]]


def save_server(
    folder: Path,
    method: Method,
    registry: Registry,
    rows: Sequence[Mapping[str, float]],
    client_rows: Sequence[Mapping[str, Any]],
) -> None:
    """Write a checkpoint; a disk that is full costs the checkpoint, not the run."""
    post = method.post
    tensors, learned = method.export()
    meta = {
        "federation-id": post.federation_id,
        "method": post.config.run.method,
        "seed": post.config.run.seed,
        "theta-offset": post.config.client.theta_offset,
        "num-steps": post.num_steps,
        "registry": registry.export(),
        "rejected": dict(post.desk.rejected),
        "rows": [dict(row) for row in rows],
        "clients": [dict(row) for row in client_rows],
        **learned,
    }
    keep = post.config.run.keep_checkpoints
    try:
        path = save_checkpoint(folder / FOLDER, tensors=tensors, meta=meta, keep=keep)
    except CheckpointError as error:
        logger.error("No checkpoint this time, the run goes on: %s", error)
        return
    logger.info("Checkpoint: %s", path)


def restore_server(source: Path, method: Method, registry: Registry) -> Progress:
    """Load a checkpoint into an empty server.

    Parameters
    ----------
    source : a run's folder, its checkpoint folder, or one checkpoint.

    Raises
    ------
    CheckpointError
        Nothing there can be read whole, or it was written by another method, or what it holds has
        another shape.
    """
    folder = source / FOLDER if (source / FOLDER).is_dir() else source
    checkpoint, post = load_checkpoint(folder), method.post
    meta = checkpoint.meta
    if meta["method"] != post.config.run.method:
        raise CheckpointError(
            f"{checkpoint.path} was written by method {meta['method']}; this run is "
            f"{post.config.run.method}. Set method to the checkpoint's to resume."
        )
    _require_same_offset(checkpoint, post.config)
    post.federation_id = str(meta["federation-id"])
    post.num_steps = int(meta["num-steps"])
    post.desk.rejected.update(meta["rejected"])
    registry.restore(meta["registry"])
    method.restore(checkpoint.tensors, meta)
    if meta["seed"] != post.config.run.seed:
        logger.warning(
            "The checkpoint's run had seed %s; this one goes on with %d, so it differs from a run "
            "that was never interrupted.",
            meta["seed"],
            post.config.run.seed,
        )
    rows: list[dict[str, float]] = meta["rows"]
    logger.info("Resumed after round %d from %s", int(rows[-1]["round"]), checkpoint.path)
    return Progress(int(rows[-1]["round"]), rows, meta["clients"])


def _require_same_offset(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Raise CheckpointError where clients would add another start to what was learned for theirs.

    With theta-offset = "init" the start of every model is drawn from the seed.
    """
    offset, seed = checkpoint.meta.get("theta-offset"), int(checkpoint.meta["seed"])
    if offset is None or config.is_baseline:  # an older one does not say; baselines have no offset
        return
    if offset != config.client.theta_offset:
        raise CheckpointError(
            f"{checkpoint.path} was learned with theta-offset = {offset!r}; this run has "
            f"{config.client.theta_offset!r}, and every model would be another one. Set "
            f"theta-offset to {offset!r} to resume."
        )
    if offset == "init" and seed != config.run.seed:
        raise CheckpointError(
            f"{checkpoint.path} was learned with seed {seed} and theta-offset = 'init': the start "
            f"that generated values are added to comes from the seed. Set seed to {seed} to "
            f"resume; it is {config.run.seed}."
        )
