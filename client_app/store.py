"""What stays on the client: BatchNorm buffers, the round's teacher, residuals, own models.

Kept in the client's state folder when it has one, else in Flower's context. Flower's context is
lost when a SuperNode restarts, so deployments always have a folder; everything also works empty.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from filelock import FileLock
from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from common.compression import Float32, Precision, indices_of_largest, num_kept, rounded
from common.errors import ConfigError
from common.files import PRIVATE, closed_folder, replace_file, safe_name, state_folder
from common.log import logger

Tensors = dict[str, Tensor]
BUFFER, VALUES, MARKER = "buffer/", "values", "federation.json"


@dataclass(frozen=True)
class Stamp:
    """The round that made a version, and for how many rounds older versions are kept."""

    server_round: int
    keep_rounds: int


class ClientState(Protocol):
    """Named groups of tensors that outlive a message."""

    def load(self, name: str, *, before: int | None = None) -> Tensors | None:
        """Return a group of tensors, or None when there is none.

        `before` asks for the newest version of an earlier round than that: a server that resumes
        from a checkpoint repeats rounds which this client has seen already.
        """

    def save(self, name: str, tensors: Mapping[str, Tensor], *, stamp: Stamp | None = None) -> None:
        """Replace a group of tensors, or add a stamped version of it."""

    def enter_federation(self, federation_id: str) -> None:
        """Forget everything that belongs to another federation."""


class ContextState:
    """State in Flower's context: for simulation, and for a client without a folder."""

    def __init__(self, context: Context) -> None:
        self._state = context.state

    def load(self, name: str, *, before: int | None = None) -> Tensors | None:
        """Return a group of tensors, or None when there is none; there are no older versions."""
        record = self._state.array_records.get(name)
        if record is None:
            return None
        return {key: torch.from_numpy(array.numpy()) for key, array in record.items()}

    def save(self, name: str, tensors: Mapping[str, Tensor], *, stamp: Stamp | None = None) -> None:
        """Replace a group of tensors."""
        self._state[name] = ArrayRecord(
            {key: Array(np.asarray(t.detach().cpu().numpy())) for key, t in tensors.items()}
        )

    def enter_federation(self, federation_id: str) -> None:
        """Forget everything that belongs to another federation."""
        known = self._state.config_records.get("federation")
        if known is None or known["id"] != federation_id:
            owned = {name: self._state[name] for name in OWNED if name in self._state}
            self._state.clear()
            self._state.update(owned)
            self._state["federation"] = ConfigRecord({"id": federation_id})


class FolderState:
    """State in a folder: survives restarts of the node. Files are replaced atomically."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            closed_folder(folder)
        except OSError as error:
            raise ConfigError(
                f"state-dir {folder} cannot be created: {error.strerror}. Choose a folder that "
                "this participant may write to."
            ) from error

    def split_seed(self) -> int:
        """Return this participant's secret, by which its examples are divided; drawn once.

        Raises ConfigError where it is damaged.
        """
        path = self.folder / SPLIT_SEED
        with FileLock(f"{path}.lock", mode=PRIVATE, timeout=LOCK_TIMEOUT_S):
            if not path.exists():
                replace_file(path, str(secrets.randbits(62)), mode=PRIVATE)
        try:
            return int(path.read_text())
        except ValueError as error:
            raise ConfigError(
                f"{path} is damaged: which examples are held back is not known. Restore it from a "
                "copy, or set split-seed."
            ) from error

    def load(self, name: str, *, before: int | None = None) -> Tensors | None:
        """Return a group of tensors, or None when there is none or it is damaged.

        Raises ConfigError where the ledger is damaged: that nothing was spent would be a lie.
        """
        if before is None:
            path = self.folder / f"{name}.safetensors"
            found = _read(path)
            if found is None and name == LEDGER and path.exists():
                raise ConfigError(
                    f"{path} is damaged: what was spent of these examples' privacy is not known. "
                    "Restore it from a copy, or start with other examples and a new state-dir."
                )
            return found
        versions = self._versions(name)
        older = (_read(versions[r]) for r in sorted(versions, reverse=True) if r < before)
        return next((tensors for tensors in older if tensors is not None), None)

    def save(self, name: str, tensors: Mapping[str, Tensor], *, stamp: Stamp | None = None) -> None:
        """Replace a group of tensors, or add a version and drop those that nobody will ask for."""
        full_name = f"{name}@{stamp.server_round:08d}" if stamp else name
        path = self.folder / f"{full_name}.safetensors"
        # copies: layers that share weights are stored twice, as their state_dict has them
        data = save(
            {
                key: t.detach().cpu().clone(memory_format=torch.contiguous_format)
                for key, t in tensors.items()
            }
        )
        replace_file(path, data, mode=PRIVATE)
        if stamp:
            self._prune(name, stamp)

    def _versions(self, name: str) -> dict[int, Path]:
        found = self.folder.glob(f"{name}@*.safetensors")
        return {int(path.stem.partition("@")[2]): path for path in found}

    def _prune(self, name: str, stamp: Stamp) -> None:
        """Drop versions of rounds that are being repeated, and all but one of the old ones."""
        versions, now = self._versions(name), stamp.server_round
        old = sorted(r for r in versions if r <= now - stamp.keep_rounds)
        for server_round in [*old[:-1], *(r for r in versions if r > now)]:
            versions[server_round].unlink(missing_ok=True)

    def enter_federation(self, federation_id: str) -> None:
        """Forget everything that belongs to another federation, but never what is `OWNED`."""
        marker = self.folder / MARKER
        try:
            known = json.loads(marker.read_text())["id"]
        except (OSError, ValueError, KeyError):
            known = None
        if known == federation_id:
            return
        for path in self.folder.glob("*.safetensors"):
            if path.stem not in OWNED:
                path.unlink(missing_ok=True)
        replace_file(marker, json.dumps({"id": federation_id}), mode=PRIVATE)


def _read(path: Path) -> Tensors | None:
    try:
        tensors: Tensors = load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None
    return tensors


PERSONAL_MODEL, OWN_MODEL, COMMON_MODEL = "personal_model", "own_model", "common_model"
SPLIT_SEED, LOCK_TIMEOUT_S = "split-seed", 60.0
LEDGER = "privacy_ledger"
"""What was spent of the examples' privacy (`client_app.privacy`)."""
OWNED = (PERSONAL_MODEL, OWN_MODEL, COMMON_MODEL, LEDGER)
"""Files that a participant keeps for good."""


def save_finite(state: ClientState, name: str, tensors: Mapping[str, Tensor], stamp: Stamp) -> None:
    """Add a version of what training left, if anything; where it diverged the last one stays.

    The server refuses such an update as well, and the next round starts from sound weights.
    """
    if tensors and all(bool(x.isfinite().all()) for x in tensors.values()):
        try:
            state.save(name, tensors, stamp=stamp)
        except OSError as error:  # a full disk costs this version, not the round
            logger.error("%s of round %d is not kept: %s", name, stamp.server_round, error)


def buffers_of(kept: Mapping[str, Tensor]) -> Tensors:
    """Return the buffers among what is kept of a model."""
    return {k.removeprefix(BUFFER): x for k, x in kept.items() if k.startswith(BUFFER)}


def open_state(context: Context, state_dir: str, client_id: str) -> ClientState:
    """Open a client's state: a folder of its own below `state_dir`, or Flower's context."""
    if state_dir:
        return FolderState(state_folder(state_dir, client_id))
    return ContextState(context)


def personal_folder(state: ClientState, output_dir: str, client_id: str) -> Path | None:
    """Return where the personal model goes: the client's folder, one below the run's, or None."""
    if isinstance(state, FolderState):
        return state.folder
    if not output_dir:
        return None
    return Path(output_dir).expanduser() / "personal-models" / safe_name(client_id)


@dataclass(frozen=True)
class Residual:
    """What a client left out of one kind of delta, to be added to the next one (error feedback).

    Top-k sparsification loses nothing in the long run this way: an entry that is small in every
    round but always of one sign grows until it is among the largest and goes up (Stich et al.,
    Sparsified SGD with memory, 2018, algorithm 1; Seide et al. 2014 for the idea). The rounding of
    the wire's precision is kept as well. A delta that the server refuses, or that comes too late,
    is lost as a dense one would be.

    Versions are stamped with their round like BatchNorm buffers, so that a server which resumes
    from a checkpoint finds the residual of that time. One version is as large as the model.
    """

    state: ClientState
    name: str
    stamp: Stamp

    def recall(self, length: int) -> Float32:
        """Return what earlier rounds left out (P,); zeros at first and after a change of model."""
        kept = self.state.load(self.name, before=self.stamp.server_round)
        if kept is None or kept[VALUES].shape != (length,):
            return np.zeros(length, dtype=np.float32)
        values: Float32 = kept[VALUES].numpy()
        return values

    def keep(self, left_out: Float32) -> None:
        """Keep what this round leaves out (P,)."""
        self.state.save(self.name, {VALUES: torch.from_numpy(left_out)}, stamp=self.stamp)


def largest_with_residual(
    delta: Float32, residual: Residual, *, top_k: float, precision: Precision
) -> Float32:
    """Return the largest entries of delta + residual (P,), 0 elsewhere; the rest is kept.

    At most `num_kept(P, top_k)` entries are not 0; they are rounded to the `precision` in which
    they travel, exactly as the server will have them.
    """
    wanted = delta + residual.recall(delta.size)
    sent, count = np.zeros_like(wanted), num_kept(delta.size, top_k)
    finite = np.isfinite(wanted)
    if not finite.all():  # the server refuses it and says why; the residual stays as it was
        bad = np.flatnonzero(~finite)[:count]
        sent[bad] = wanted[bad]
        return sent
    indices = indices_of_largest(wanted, count)
    values = rounded(wanted[indices], precision)
    while not values.all():  # zeros are not sent, and float16 scales blocks of what is
        indices = indices[values != 0]
        values = rounded(wanted[indices], precision)
    sent[indices] = values
    if np.isfinite(values).all():  # rounding may overflow; what is kept would be lost for good
        residual.keep(wanted - sent)
    return sent
