"""Parameters that stay as they are built: kept once for all versions of a participant's model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from client_app.store import COMMON_MODEL, OWN_MODEL, PERSONAL_MODEL, FolderState
from common.files import PRIVATE, replace_file

FROZEN = "frozen"


def frozen_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that stay as they are built, by name."""
    return {n: p.detach() for n, p in module.named_parameters() if not p.requires_grad}


def link_frozen(frozen: Mapping[str, Tensor], once: Path, folder: Path) -> None:
    """Write frozen parameters below `once`, unless they are there, and link them into a folder."""
    digest = hashlib.sha256()
    for name, tensor in sorted(frozen.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    name = f"{FROZEN}-{digest.hexdigest()[:16]}"
    if not (once / f"{name}.safetensors").exists():
        FolderState(once).save(name, frozen)
    link = folder / f"{FROZEN}.safetensors"
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(once / f"{name}.safetensors")
    except OSError:  # not every file system can
        shutil.copyfile(once / f"{name}.safetensors", link)
        link.chmod(PRIVATE)


def frozen_of(folder: Path) -> dict[str, Tensor]:
    """Return the frozen parameters of a version; {} where its weights are whole."""
    path = folder / f"{FROZEN}.safetensors"
    return load_file(path) if path.exists() else {}


def make_whole(folder: Path) -> None:
    """Put the frozen parameters of a version into its plain state_dicts."""
    if not (frozen := frozen_of(folder)):
        return
    for name, prefix in ((PERSONAL_MODEL, ""), (OWN_MODEL, "own."), (COMMON_MODEL, "common.")):
        if (path := folder / f"{name}.safetensors").exists():
            mine = {k.removeprefix(prefix): x for k, x in frozen.items() if k.startswith(prefix)}
            FolderState(folder).save(name, load_file(path) | mine)
    (folder / f"{FROZEN}.safetensors").unlink()
    about = json.loads((folder / f"{PERSONAL_MODEL}.json").read_text())
    about.pop("frozen", None)
    replace_file(folder / f"{PERSONAL_MODEL}.json", json.dumps(about, indent=2), mode=PRIVATE)
