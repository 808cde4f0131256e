"""The whole server in one checkpoint: phi, embeddings, Adam, registry, round, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CheckpointError
from common.log import logger
from server_app.checkpoint import load_checkpoint, save_checkpoint
from server_app.phases import Core
from server_app.registry import Registry

FOLDER = "checkpoint"


@dataclass(frozen=True)
class Progress:
    """Where a restored run stands."""

    server_round: int
    rows: list[dict[str, float]]
    client_rows: list[dict[str, Any]]


def save_server(
    folder: Path,
    core: Core,
    registry: Registry,
    rows: Sequence[Mapping[str, float]],
    client_rows: Sequence[Mapping[str, Any]],
) -> None:
    """Write a checkpoint; a disk that is full costs the checkpoint, not the run."""
    phi, hypernet_meta = core.hypernet.state_dict()
    adam, update_meta = core.update.state_dict()
    meta = {
        "federation-id": core.federation_id,
        "method": core.config.run.method,
        "seed": core.config.run.seed,
        "num-steps": core.num_steps,
        "hypernet": hypernet_meta,
        "update": update_meta,
        "registry": registry.export(),
        "rejected": dict(core.desk.rejected),
        "norms": core.norms.export(),
        "frozen": _frozen(core),
        "rows": [dict(row) for row in rows],
        "clients": [dict(row) for row in client_rows],
    }
    keep = core.config.run.keep_checkpoints
    try:
        path = save_checkpoint(folder / FOLDER, tensors=phi | adam, meta=meta, keep=keep)
    except CheckpointError as error:
        logger.error("No checkpoint this time, the run goes on: %s", error)
        return
    logger.info("Checkpoint: %s", path)


def _frozen(core: Core) -> dict[str, Any] | None:
    if not core.config.run.novel_only:
        return None
    groups = sorted(core.update.frozen_groups)
    return {"clients": sorted(core.frozen_clients), "groups": groups}


def restore_server(source: Path, core: Core, registry: Registry) -> Progress:
    """Load a checkpoint into an empty server.

    Parameters
    ----------
    source : a run's folder, its checkpoint folder, or one checkpoint.

    Raises
    ------
    CheckpointError
        Nothing there can be read whole, or it was written by another method, for another shape of
        the hypernetwork.
    """
    folder = source / FOLDER if (source / FOLDER).is_dir() else source
    checkpoint = load_checkpoint(folder)
    meta = checkpoint.meta
    if meta["method"] != core.config.run.method:
        raise CheckpointError(
            f"{checkpoint.path} was written by method {meta['method']}; this run is "
            f"{core.config.run.method}. Set method to the checkpoint's to resume."
        )
    core.hypernet.load_state_dict(checkpoint.tensors, meta["hypernet"])
    core.update.load_state_dict(checkpoint.tensors, meta["update"])
    core.federation_id = str(meta["federation-id"])
    core.num_steps = int(meta["num-steps"])
    core.desk.rejected.update(meta["rejected"])
    core.norms.restore(meta["norms"])
    registry.restore(meta["registry"])
    if core.config.run.novel_only:
        _freeze(core, meta["frozen"])
    if meta["seed"] != core.config.run.seed:
        logger.warning(
            "The checkpoint's run had seed %s; this one goes on with %d, so it differs from a run "
            "that was never interrupted.",
            meta["seed"],
            core.config.run.seed,
        )
    rows: list[dict[str, float]] = meta["rows"]
    logger.info("Resumed after round %d from %s", int(rows[-1]["round"]), checkpoint.path)
    return Progress(int(rows[-1]["round"]), rows, meta["clients"])


def _freeze(core: Core, before: Mapping[str, Any] | None) -> None:
    """Freeze all there is; a novel-only run that is resumed freezes what it froze before."""
    core.frozen_clients |= set(before["clients"] if before else core.hypernet.clients())
    core.update.freeze(before["groups"] if before else core.hypernet.groups)
    logger.info(
        "Trunk, %d head groups and %d embeddings are frozen: only new clients learn",
        len(core.update.frozen_groups),
        len(core.frozen_clients),
    )
