"""Run config and node config: parsed once, bad values rejected with the key that is wrong.

The fields of the sections are the one place that says a key's default, bounds, unit and meaning;
pyproject's table and `mh-pfedhn keys` are made from them (`common.config.keys`).
"""

from common.config.client import (
    ClientSection,
    WireSection,
    named_augmentations,
    named_classes,
    value_range,
)
from common.config.hypernet import HypernetSection, UpdateSection
from common.config.node import NodeConfig
from common.config.run import RunSection, ScheduleSection
from common.config.run_config import Declared, RunConfig, declared
from common.config.training import BaselineSection, DistillSection, TrainingSection

__all__ = [
    "BaselineSection",
    "ClientSection",
    "Declared",
    "DistillSection",
    "HypernetSection",
    "NodeConfig",
    "RunConfig",
    "RunSection",
    "ScheduleSection",
    "TrainingSection",
    "UpdateSection",
    "WireSection",
    "declared",
    "named_augmentations",
    "named_classes",
    "value_range",
]
