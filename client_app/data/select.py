"""From the name of a data set to its source."""

from __future__ import annotations

from pathlib import Path

from client_app.data.catalogue import CATALOGUE, DATASET_NAMES
from client_app.data.own import FolderSource, FunctionSource
from client_app.data.published import DigitsSource, HubSource, find_local_files
from client_app.data.source import Source
from common.errors import ConfigError, unknown_name


def select_source(dataset: str, data_dir: str) -> Source:
    """Choose the source that a client's `dataset` and `data-dir` name.

    Raises
    ------
    ConfigError
        The data set is unknown, or data-dir is missing where it is needed.
    DataError
        data-dir does not hold the data set.
    """
    if ":" in dataset:
        return FunctionSource(dataset, data_dir)
    if dataset == "digits":
        return DigitsSource()
    if dataset == "folder":
        if not data_dir:
            raise ConfigError("dataset = 'folder' needs data-dir, a folder of class/picture.png.")
        return FolderSource(Path(data_dir).expanduser().resolve())
    if dataset not in CATALOGUE:
        known = unknown_name("dataset", dataset, DATASET_NAMES)
        raise ConfigError(f"{known} Or 'module:function' for your own.")
    return find_local_files(dataset, data_dir) if data_dir else HubSource(dataset)
