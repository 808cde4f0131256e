"""Memory that training frees stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from common.allocator import keep_freed_memory

EPOCHS = """
import resource, torch
from client_app.training.loop import train
from client_app.workshop import ModelKind, borrow
from common.config import TrainingSection
from tests.unit.client_app.test_training_speed import pictures

torch.set_num_threads(1)
tool = borrow(ModelKind("cnn", 3, 10, torch.device("cpu")))
data, generator = pictures(num_train=640), torch.Generator().manual_seed(0)

def epochs(count):
    for _ in range(count):
        train(tool.model, data, TrainingSection(), generator=generator)

epochs(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
epochs(5)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="not glibc")
def test_an_epoch_asks_the_system_for_no_memory() -> None:
    """Without `keep_freed_memory` it takes 10,000 pages and more: 13,000 to 30,000 measured."""
    found = subprocess.run(
        [sys.executable, "-c", EPOCHS], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) < 5 * 500
