"""Facts about the data sets known by name (method.md, "Data and evaluation")."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetSpec:
    """What cannot be read from the pictures of a data set.

    `hub_id` is a repository on the Hugging Face hub; classes are those of the official train split,
    labels 0 to num_classes - 1; `mean` and `std` normalise each channel, in units of full intensity
    (0 to 1); `classes_per_client` and `dirichlet_alpha` are what the published partitions take.
    `idx_prefix` starts the names of its IDX files (the format of MNIST), which the hub has instead
    of parquet where `idx_on_hub`; `transposed` pictures have rows and columns swapped. Parquet has
    labels in `label_column`, if it is named, and in `group_column` who or where an example is of:
    partition "natural-id" gives each client one of these. `splits` are read; where those on the hub
    are by group, all of them.
    """

    hub_id: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes_per_client: int = 2
    dirichlet_alpha: float = 0.01
    idx_prefix: str = ""
    idx_on_hub: bool = False
    transposed: bool = False
    label_column: str = ""
    group_column: str = ""
    splits: tuple[str, ...] = ("train",)


CATALOGUE: dict[str, DatasetSpec] = {
    "cifar10": DatasetSpec(
        "uoft-cs/cifar10", 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010),
        dirichlet_alpha=0.1,
    ),
    "cifar100": DatasetSpec(
        "uoft-cs/cifar100", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 10
    ),
    "tiny-imagenet": DatasetSpec(
        "zh-plus/tiny-imagenet", 200, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821), 20
    ),
    # ByClass: 697,932 characters. NIST's files hold every character transposed; so do the mirrors.
    # No parquet copy is on the hub: this repository has NIST's own IDX files.
    "emnist": DatasetSpec(
        "Royc30ne/emnist-byclass", 62, (0.5,), (0.5,), 6,
        idx_prefix="emnist-byclass-train", idx_on_hub=True, transposed=True,
    ),
    # LEAF's FEMNIST (arXiv 1812.01097): 814,277 of these characters with their 3,597 writers
    "femnist": DatasetSpec(
        "flwrlabs/femnist", 62, (0.5,), (0.5,), 6,
        label_column="character", group_column="writer_id",
    ),
    # WILDS (arXiv 2012.07421): tumour or not, 96x96, five hospitals; what a camera trap saw, of 323
    "camelyon17": DatasetSpec(
        "wltjr1007/Camelyon17-WILDS", 2, (0.5,) * 3, (0.5,) * 3, 1,
        group_column="center", splits=("train", "validation", "test"),
    ),
    "iwildcam": DatasetSpec("", 182, (0.5,) * 3, (0.5,) * 3, 10),
    # six activities of 30 people, 561 columns (UCI, "Human Activity Recognition Using Smartphones")
    "har": DatasetSpec("", 6, (), (), 2),
    # constants of the train split at 28x28; the paper does not use this data set
    "fashion-mnist": DatasetSpec(
        "zalando-datasets/fashion_mnist", 10, (0.2860,), (0.3530,), dirichlet_alpha=0.1,
        idx_prefix="train",
    ),
    # 1,797 digits of scikit-learn; constants computed on them at 32x32; not in the paper either
    "digits": DatasetSpec("", 10, (0.3055,), (0.3235,), dirichlet_alpha=0.1),
}  # fmt: skip

OWN = DatasetSpec(hub_id="", num_classes=0, mean=(0.5,), std=(0.5,), dirichlet_alpha=0.1)
"""A participant's own pictures: full intensity to [-1, 1], and the hardest published partition."""

DATASET_NAMES: tuple[str, ...] = (*CATALOGUE, "folder")
