"""The published data sets: embedded, from the Hugging Face hub, or from a local folder.

Formats: parquet as the hub has it (a column of {"bytes", "path"} structs and a column of integer
labels), and IDX, the format of MNIST. Only the official train split is read (method.md), but where
splits are by hospital.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client_app.data.catalogue import CATALOGUE, DatasetSpec
from client_app.data.decode import decode_picture, resize_array
from client_app.data.source import Division, Examples, ReadExample, Source, file_identity
from common.errors import DataError, listing

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label")
IDX_PARTS = ("images-idx3-ubyte", "labels-idx1-ubyte")
MOST_IDX = 1 << 30
"""Bytes of an IDX file; EMNIST ByClass has half of it."""


def find_local_files(dataset: str, data_dir: str) -> Source:
    """Find the train split under data-dir.

    Looked at, in this order: the folders data-dir/<dataset>, data-dir/<name on the hub> and
    data-dir itself; in each, train*.parquet (and the other splits of a data set that is read
    whole), then the same one folder deeper (data-dir itself: only in `data`), then IDX files.
    Raises DataError where nothing, or not every shard, is there.
    """
    root = Path(data_dir).expanduser().resolve()
    spec = CATALOGUE[dataset]
    for folder in (root / dataset, root / spec.hub_id.rpartition("/")[2], root):
        for below in ("", "data/" if folder == root else "*/"):
            splits = [sorted(folder.glob(f"{below}{split}*.parquet")) for split in spec.splits]
            if splits[0]:
                return ParquetSource(dataset, tuple(f for files in splits for f in _whole(files)))
        if pair := _idx_pair(folder, spec.idx_prefix):
            return IdxSource(dataset, *pair)
    raise DataError(
        f"no {dataset} in data-dir {root}: expected {dataset}/train.parquet or "
        f"{dataset}/train-00000-of-00001.parquet, as {spec.hub_id} on the Hugging Face hub has it. "
        "Give the absolute path of the folder, or leave data-dir empty to download."
    )


@dataclass(frozen=True)
class DigitsSource:
    """The 1,797 handwritten digits that scikit-learn ships: 8x8, grey, 17 levels."""

    def fingerprint(self) -> list[Any]:
        """Return a constant: the pictures are part of the package."""
        return ["scikit-learn digits"]

    def read(self, image_size: int) -> Examples:
        """Scale the levels 0..16 to 0..255 and open."""
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        levels = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        return examples_of(
            labels,
            len(levels),
            lambda index: resize_array(levels[index], image_size=image_size),
            CATALOGUE["digits"],
            where="scikit-learn",
        )


@dataclass(frozen=True)
class ParquetSource:
    """Local parquet files in the hub's format."""

    dataset: str
    files: tuple[Path, ...]

    def fingerprint(self) -> list[Any]:
        """Return path, size and modification time of every file."""
        return ["parquet", *(file_identity(path) for path in self.files)]

    def read(self, image_size: int) -> Examples:
        """Read the encoded pictures into memory (90 MB for CIFAR) and open."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        where = str(self.files[0])
        try:
            names = pq.read_schema(self.files[0]).names
            columns = _columns(names, CATALOGUE[self.dataset], where)
            table = pa.concat_tables(pq.read_table(path, columns=columns) for path in self.files)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot read {listing(self.files)}: {error}") from error
        return _table_examples(table, CATALOGUE[self.dataset], where=where, image_size=image_size)


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hugging Face hub, downloaded by the library `datasets`.

    The fingerprint is the repository's name: remove the cache to follow a change of it.
    """

    dataset: str

    def fingerprint(self) -> list[Any]:
        """Return the repository's name."""
        return ["hub", CATALOGUE[self.dataset].hub_id]

    def read(self, image_size: int) -> Examples:
        """Download the train split and open."""
        spec = CATALOGUE[self.dataset]
        try:
            if spec.idx_on_hub:
                return self._download_idx(spec).read(image_size)
            table = _download_table(spec)
        except (OSError, ValueError) as error:  # ConnectionError and "not found" are OSErrors
            raise DataError(
                f"cannot download {self.dataset} ({spec.hub_id}) from the Hugging Face hub: "
                f"{type(error).__name__}: {error}. Without a connection set data-dir to a folder "
                f"that holds {self.dataset}/train.parquet."
            ) from error
        return _table_examples(table, spec, where=spec.hub_id, image_size=image_size)

    def _download_idx(self, spec: DatasetSpec) -> IdxSource:
        from huggingface_hub import hf_hub_download

        images, labels = (
            hf_hub_download(spec.hub_id, f"{spec.idx_prefix}-{part}.gz", repo_type="dataset")
            for part in IDX_PARTS
        )
        return IdxSource(self.dataset, Path(images), Path(labels))


@dataclass(frozen=True)
class IdxSource:
    """A pair of IDX files (images and labels), gzipped or not."""

    dataset: str
    images: Path
    labels: Path

    def fingerprint(self) -> list[Any]:
        """Return path, size and modification time of both files."""
        return ["idx", file_identity(self.images), file_identity(self.labels)]

    def read(self, image_size: int) -> Examples:
        """Read both files into memory and open; transposed pictures are turned upright."""
        spec = CATALOGUE[self.dataset]
        pixels, labels = read_idx(self.images, 3), read_idx(self.labels, 1)
        upright = pixels.transpose(0, 2, 1) if spec.transposed else pixels
        return examples_of(
            labels,
            len(pixels),
            lambda index: resize_array(upright[index][..., None], image_size=image_size),
            spec,
            where=str(self.labels),
        )


def read_idx(path: Path, num_axes: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes with `num_axes` axes; DataError where it is another."""
    header, sizes = 4 + 4 * num_axes, f">{num_axes}I"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            begin = file.read(header)
            shape = struct.unpack(sizes, begin[4:]) if len(begin) == header else ()
            count = min(math.prod(shape), MOST_IDX)
            data = file.read(count + 1)  # what is packed may be longer than it says
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if begin[:4] != bytes([0, 0, 8, num_axes]) or len(data) != math.prod(shape):
        raise DataError(
            f"{path} is not a whole IDX file of at most {MOST_IDX:,} unsigned bytes with "
            f"{num_axes} axes: its header is {begin[:4].hex()}, its sizes {shape}, and "
            f"{len(data)} bytes were read. Download it again."
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _download_table(spec: DatasetSpec) -> Any:
    from datasets import Image, load_dataset

    rows = load_dataset(spec.hub_id, split="+".join(spec.splits))
    columns = _columns(rows.column_names, spec, spec.hub_id)
    rows = rows.select_columns(columns).cast_column(columns[0], Image(decode=False))
    return rows.with_format("arrow")[:]


def _table_examples(table: Any, spec: DatasetSpec, *, where: str, image_size: int) -> Examples:
    name, label, *group = _columns(table.column_names, spec, where)
    data = _encoded(table[name].combine_chunks(), f"{where}: {name}")
    if data.null_count:
        raise DataError(f"{where}: {data.null_count} pictures have no bytes. Download it again.")
    division = Division.of(groups=table[group[0]].to_numpy() if group else None)

    def read_example(index: int) -> NDArray[np.uint8]:
        pixels = decode_picture(
            data[index].as_py(),
            channels=len(spec.mean),
            image_size=image_size,
            name=f"{where}, row {index}",
        )
        return pixels.transpose(0, 2, 1) if spec.transposed else pixels

    labels = table[label].to_numpy()
    found = examples_of(labels, len(data), read_example, spec, where=where)
    return replace(found, division=division)


def _encoded(column: Any, where: str) -> Any:
    """Return a column's encoded pictures: of {"bytes", "path"} structs, or plain bytes."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = column.field("bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(
            f"{where} is {kind}; expected encoded pictures (PNG, JPEG), as struct<bytes: binary, "
            "path: string> or as binary."
        )
    return column


def examples_of(
    labels: NDArray[Any], count: int, read_example: ReadExample, spec: DatasetSpec, *, where: str
) -> Examples:
    """Check the labels of `count` pictures against what is known of the data set."""
    whole = np.issubdtype(labels.dtype, np.integer)
    good = whole and len(labels) and labels.min() >= 0 and labels.max() < spec.num_classes
    if not good or len(labels) != count:
        span = f"{labels.min()}..{labels.max()}" if len(labels) and whole else f"{labels.dtype}"
        raise DataError(
            f"{where}: expected one label from 0 to {spec.num_classes - 1} for each of {count} "
            f"pictures, got {len(labels)} labels, {span}. Is it another data set?"
        )
    return Examples(labels.astype(np.int64), spec.num_classes, spec.mean, spec.std, read_example)


def _columns(names: list[str], spec: DatasetSpec, where: str) -> list[str]:
    """Return the columns of pictures, labels and, where the data set has them, groups."""
    labels = (spec.label_column,) if spec.label_column else LABEL_COLUMNS
    wanted = [IMAGE_COLUMNS, labels, *([(spec.group_column,)] if spec.group_column else [])]
    return [_column(names, candidates, where) for candidates in wanted]


def _column(names: list[str], candidates: tuple[str, ...], where: str) -> str:
    for name in candidates:
        if name in names:
            return name
    raise DataError(
        f"{where} has the columns {listing(names)}; expected one named {' or '.join(candidates)}."
    )


def _whole(files: list[Path]) -> list[Path]:
    """Check that no shard of train-00000-of-00002.parquet is missing."""
    for path in files:
        shard = re.search(r"-\d+-of-(\d+)", path.name)
        if shard and int(shard[1]) != len(files):
            raise DataError(
                f"{path.parent} has {len(files)} of the {int(shard[1])} shards that {path.name} "
                "belongs to. Download the others, and keep other splits elsewhere."
            )
    return files


def _idx_pair(folder: Path, prefix: str) -> tuple[Path, Path] | None:
    for suffix in ("", ".gz"):
        images, labels = (folder / f"{prefix}-{part}{suffix}" for part in IDX_PARTS)
        if prefix and images.is_file() and labels.is_file():
            return images, labels
    return None
