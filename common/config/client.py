"""What a client uses where it declares nothing itself; how arrays travel."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator

from common.config.section import Section, key
from common.errors import ConfigError, unknown_name

SIMULATED = "engine inprocess"
AUGMENTATIONS = ("flip", "crop")
MOST_CLASSES, LONGEST_NAME = 10_000, 100
PRIVATE_METHODS = "MH-pFedHN, Local"


def named_augmentations(text: str) -> tuple[str, ...]:
    """Return the names of a comma list, () for "none" and for a function of one's own.

    Raises ValueError at an unknown one.

    >>> named_augmentations("flip, crop")
    ('flip', 'crop')
    """
    names = () if text == "none" or ":" in text else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in AUGMENTATIONS:
            known = unknown_name("augmentation", name, AUGMENTATIONS).removesuffix(".")
            raise ValueError(f'{known}; "none" stands alone')
    return names


def _known_augmentations(text: str) -> str:
    named_augmentations(text)
    return text


def named_classes(text: str) -> tuple[str, ...]:
    """Return the names of a comma list, () for none; raise ValueError at a name that is twice.

    >>> named_classes("cat, dog")
    ('cat', 'dog')
    """
    names = tuple(name.strip() for name in text.split(",")) if text.strip() else ()
    if len(names) > MOST_CLASSES:
        raise ValueError(f"class-names has {len(names):,} names; at most {MOST_CLASSES:,}")
    if long := [n for n in names if len(n) > LONGEST_NAME or not n.isprintable()]:
        raise ValueError(f"class {long[0][:LONGEST_NAME]!r} must be at most {LONGEST_NAME} letters")
    if "" in names or len(set(names)) < len(names) or len(names) == 1:
        raise ValueError(f"class-names {text!r} must be two or more different names")
    return names


def _known_classes(text: str) -> str:
    named_classes(text)
    return text


def value_range(text: str) -> tuple[float, float] | None:
    """Return what becomes 0 and what becomes 255, None for ""; raise ValueError where it is none.

    >>> value_range("255..0")
    (255.0, 0.0)
    """
    if not text.strip():
        return None
    first, _, last = text.partition("..")
    try:
        found = float(first), float(last)
    except ValueError:
        found = math.nan, math.nan
    if not all(map(math.isfinite, found)) or found[0] == found[1]:
        raise ValueError(
            f'{text!r} must be two different numbers, as "0..4095"; "255..0" inverts pictures'
        )
    return found


def _known_range(text: str) -> str:
    value_range(text)
    return text


Intensity = Annotated[str, AfterValidator(_known_range)]
ClassNames = Annotated[str, AfterValidator(_known_classes)]


def _enough_noise(noise: float) -> float:
    if 0 < noise < LEAST_NOISE:
        raise ValueError(f"noise below {LEAST_NOISE} protects nobody; 0 is none")
    return noise


LEAST_NOISE = 0.2
Noise = Annotated[float, AfterValidator(_enough_noise)]
Augmentation = Annotated[str, AfterValidator(_known_augmentations)]


class ClientSection(Section):
    """Model, data and device of a client; its node config wins over all of this."""

    models: str = key(
        "cnn,vgg8,resnet10,resnet12,resnet18",
        'contiguous blocks of clients, or one name, or "module:factory"',
    )
    dataset: str = key(
        "digits",
        "digits, cifar10, cifar100, tiny-imagenet, emnist, fashion-mnist, femnist, camelyon17, "
        'iwildcam, har, folder, or "module:function"',
    )
    data_dir: str = key(
        "", "local parquet files (hub format) or picture folder; empty: from the hub"
    )
    cache_dir: str = key("", "decoded data; empty: ~/.cache/mh-pfedhn")
    partition: str = key(
        "pathological",
        "pathological, dirichlet, natural-id (a writer, hospital, person each), none, or a "
        "flwr-datasets partitioner",
    )
    num_partitions: int = key(10, "where the node config has none", ge=1)
    absent_clients: int = key(
        0, "the last so many stay away, to join a later run", where=SIMULATED, ge=0
    )
    classes_per_client: int = key(
        0, "0: the data set's published value", where='partition "pathological"', ge=0
    )
    dirichlet_alpha: float = key(
        0.0, "0: the data set's published value", where='partition "dirichlet"', ge=0
    )
    min_client_examples: int = key(
        30, "drawn again until everybody has more", where='partition "dirichlet"', ge=1
    )
    max_client_examples: int = key(
        0, "cap on a client's examples, train and test together, labels in proportion; 0: all", ge=0
    )
    partition_options: str = key("{}", "JSON keywords", where="a flwr-datasets partitioner")
    test_fraction: float = key(0.25, "of a client's examples, held back from training", gt=0, lt=1)
    validation_fraction: float = key(
        0.1,
        "of a client's examples, of those held back: what its predictor is chosen on, never tested",
        ge=0,
        lt=1,
    )
    class_names: ClassNames = key(
        "",
        "names of all classes in their order, separated by commas; a client's own data may lack "
        "some; empty: as its folders are named, or as its labels count",
        where='dataset "folder" or "module:function"',
    )
    tested_on: Literal["test", "validation"] = key(
        "test",
        'whose accuracy is told; "validation": to choose settings by, test examples stay unseen',
    )
    measure_alone: bool = key(
        True,
        "train the model also alone, by the same recipe and never touched by the federation: what "
        "joining is worth",
    )
    image_size: int = key(
        32, "pictures of another size are scaled", unit="pixels a side", ge=8, le=2048
    )
    channels: Literal[0, 1, 3] = key(
        0, "to which all pictures are brought: 1 grey, 3 RGB; 0: as they are"
    )
    intensity: Intensity = key(
        "",
        'what becomes 0 and what 255 of pictures, as "0..4095", "0..1", or "255..0", which inverts '
        "them; empty: 8 bits as they are, of more the least and the largest value of all",
        where='dataset "folder" or "module:function"',
    )
    augmentation: Augmentation = key(
        "none",
        "of training pictures: flip (half of them, sideways), crop (moved by up to 1/8); or "
        '"module:function" of one\'s own, for a batch of any examples',
    )
    dp_noise: Noise = key(
        0.0,
        "DP-SGD on the client: noise in units of dp-clip, so that no single training example "
        "shows; of the run's and a participant's own the larger counts; 0: off",
        where=PRIVATE_METHODS,
        ge=0,
        le=1e4,
    )
    dp_clip: float = key(
        1.0, "a single example's longer gradient is scaled down to it", where="dp-noise",
        unit="norm", ge=1e-3, le=1e3,
    )  # fmt: skip
    loss: str = key(
        "",
        "that is descended: empty: of the labels' kind; balanced (of classes, all weigh alike), "
        'a weight for each class, as "1, 5", absolute (of numbers), or "module:function": '
        "(outputs, labels) -> loss of each example",
    )
    device: str = key("auto", "auto, cpu, cuda:0")
    client_threads: int = key(1, "torch CPU threads of one client; 0: torch's own choice", ge=0)
    state_dir: str = key(
        "", "where a client keeps its state; empty: in Flower's context, while the process lives"
    )

    def require_test_part(self, where: str) -> None:
        """Raise ConfigError where the validation examples would be all that is held back."""
        if self.validation_fraction >= self.test_fraction:
            raise ConfigError(
                f"{where}: validation-fraction = {self.validation_fraction:g} of a client's "
                f"examples is taken from test-fraction = {self.test_fraction:g}, and leaves "
                "nothing to test on. Raise test-fraction, or set validation-fraction lower; 0 "
                "is for methods that choose nothing."
            )


class WireSection(Section):
    """How arrays travel. Down: theta; up: delta."""

    wire_precision: Literal["float32", "float16", "bfloat16"] = key(
        "float32", "of arrays on the way; the 16-bit ones are half the bytes"
    )
    uplink_top_k: float = key(
        1.0,
        "fraction of a delta's entries that goes up, the largest; the rest waits for the next"
        " round",
        where="MH-pFedHN",
        gt=0,
        le=1,
    )
