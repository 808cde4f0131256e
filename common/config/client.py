"""The keys of a client that declares nothing itself, and of the way between it and the server."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.config.section import Section


class ClientSection(Section):
    """What a client that declared nothing itself uses: model, data, device.

    `models` is one name, or several separated by commas that are given to contiguous blocks of
    clients. `theta_offset` "init" adds what is generated to the parameters that the model's own
    code initialises, drawn from the run's seed (all clients of one architecture alike): BatchNorm's
    gammas then start at 1. 0 for `classes_per_client` and `dirichlet_alpha` means the published
    value of the data set. `num_partitions` is used where Flower's node config has none.
    The last `absent_clients` of a simulation stay away (engine inprocess): their share of the data
    is theirs, and they can join a later run as new clients.
    `max_client_examples` caps what a client has, train and test together; 0: everything.
    """

    models: str = "cnn,vgg8,resnet10,resnet12,resnet18"
    dataset: str = "digits"
    data_dir: str = ""
    cache_dir: str = ""
    partition: str = "pathological"
    num_partitions: int = Field(10, ge=1)
    absent_clients: int = Field(0, ge=0)
    classes_per_client: int = Field(0, ge=0)
    dirichlet_alpha: float = Field(0.0, ge=0)
    min_client_examples: int = Field(30, ge=1)
    max_client_examples: int = Field(0, ge=0)
    partition_options: str = "{}"
    test_fraction: float = Field(0.25, gt=0, lt=1)
    image_size: int = Field(32, ge=8)
    device: str = "auto"
    theta_offset: Literal["none", "init"] = "init"
    client_threads: int = Field(1, ge=0)
    state_dir: str = ""


class WireSection(Section):
    """How arrays travel. Down: theta; up: delta.

    `uplink_top_k` is the fraction of a delta's entries that go up, those of largest magnitude; the
    client adds what it left out to the next round's delta (`client_app.store`). 1: all of them.
    """

    wire_precision: Literal["float32", "float16", "bfloat16"] = "float32"
    uplink_top_k: float = Field(1.0, gt=0, le=1)
