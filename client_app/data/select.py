"""Which source a participant's `dataset` and `data-dir` name."""

from __future__ import annotations

from pathlib import Path

from client_app.data.catalogue import CATALOGUE, DATASET_NAMES
from client_app.data.function import FunctionSource
from client_app.data.natural import NATURAL_SOURCES
from client_app.data.own import FolderSource
from client_app.data.published import DigitsSource, HubSource, find_local_files
from client_app.data.source import Source
from common.config import value_range
from common.errors import ConfigError, unknown_name


def select_source(
    dataset: str, data_dir: str, class_names: tuple[str, ...] = (), intensity: str = ""
) -> Source:
    """Return the source that a client's `dataset` and `data-dir` name; raises as `prepare_data`."""
    scale = value_range(intensity)
    if ":" in dataset:
        return FunctionSource(dataset, data_dir, class_names, scale)
    if scale and dataset != "folder":
        raise ConfigError(
            f"intensity = {intensity!r} is for pictures of your own, a folder or "
            f"'module:function'; it is known how those of {dataset} are meant. Leave it out."
        )
    if dataset == "digits":
        return DigitsSource()
    if dataset == "folder":
        if not data_dir:
            raise ConfigError("dataset = 'folder' needs data-dir, a folder of class/picture.png.")
        return FolderSource(Path(data_dir).expanduser().resolve(), class_names, scale)
    if dataset not in CATALOGUE:
        known = unknown_name("dataset", dataset, DATASET_NAMES)
        raise ConfigError(f"{known} Or 'module:function' for your own.")
    if dataset in NATURAL_SOURCES:
        if not data_dir:
            raise ConfigError(
                f"dataset = {dataset!r} is not on the hub: it needs data-dir, the folder of the "
                f"unpacked archive, which holds {NATURAL_SOURCES[dataset].holds}."
            )
        return NATURAL_SOURCES[dataset](Path(data_dir).expanduser().resolve())
    return find_local_files(dataset, data_dir) if data_dir else HubSource(dataset)
