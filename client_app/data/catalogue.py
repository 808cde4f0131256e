"""Facts about the data sets known by name (method.md, "Data and evaluation")."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetSpec:
    """What cannot be read from the pictures of a data set.

    Attributes
    ----------
    hub_id
        Repository on the Hugging Face hub.
    num_classes
        Classes of the official train split; labels are 0 to num_classes - 1.
    mean, std
        Normalisation for each channel, in units of full intensity (0 to 1).
    classes_per_client, dirichlet_alpha
        What the published partitions take.
    idx_prefix
        Start of the names of the data set's IDX files (the format of MNIST).
    idx_on_hub
        The hub has IDX files, not parquet.
    transposed
        Pictures are stored with rows and columns swapped and must be turned upright.
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


CATALOGUE: dict[str, DatasetSpec] = {
    "cifar10": DatasetSpec(
        hub_id="uoft-cs/cifar10",
        num_classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        dirichlet_alpha=0.1,
    ),
    "cifar100": DatasetSpec(
        hub_id="uoft-cs/cifar100",
        num_classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        classes_per_client=10,
    ),
    "tiny-imagenet": DatasetSpec(
        hub_id="zh-plus/tiny-imagenet",
        num_classes=200,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        classes_per_client=20,
    ),
    # ByClass: 697,932 characters. NIST's files hold every character transposed; so do the mirrors.
    # No parquet copy is on the hub: this repository has NIST's own IDX files.
    "emnist": DatasetSpec(
        hub_id="Royc30ne/emnist-byclass",
        num_classes=62,
        mean=(0.5,),
        std=(0.5,),
        classes_per_client=6,
        idx_prefix="emnist-byclass-train",
        idx_on_hub=True,
        transposed=True,
    ),
    # constants of the train split at 28x28; the paper does not use this data set
    "fashion-mnist": DatasetSpec(
        hub_id="zalando-datasets/fashion_mnist",
        num_classes=10,
        mean=(0.2860,),
        std=(0.3530,),
        dirichlet_alpha=0.1,
        idx_prefix="train",
    ),
    # 1,797 digits of scikit-learn; constants computed on them at 32x32; not in the paper either
    "digits": DatasetSpec(
        hub_id="",
        num_classes=10,
        mean=(0.3055,),
        std=(0.3235,),
        dirichlet_alpha=0.1,
    ),
}

OWN = DatasetSpec(hub_id="", num_classes=0, mean=(0.5,), std=(0.5,), dirichlet_alpha=0.1)
"""A participant's own pictures: full intensity to [-1, 1], and the hardest published partition."""

DATASET_NAMES: tuple[str, ...] = (*CATALOGUE, "folder")
