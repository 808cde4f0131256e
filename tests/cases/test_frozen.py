"""Models of which a part is frozen: it is neither generated nor decayed, and the rest learns."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from client_app.models.building import ModelKind
from client_app.models.instances import instance_of
from tests.cases.test_models import CPU, body, federation, stored
from tests.support.outputs import client_rows, rows

HERE = __name__


class Frozen(nn.Module):
    def __init__(self, channels: int, classes: int, flag: bool) -> None:
        super().__init__()
        self.body, self.out, self.flag = body(channels), nn.Linear(32, classes), flag
        if flag:
            self.body.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.flag and torch.is_grad_enabled()):
            features = self.body(x)
        return self.out(features)


def frozen_by_no_grad(*, in_channels: int, num_classes: int) -> nn.Module:
    return Frozen(in_channels, num_classes, flag=False)


def frozen_by_flag(*, in_channels: int, num_classes: int) -> nn.Module:
    return Frozen(in_channels, num_classes, flag=True)


@pytest.mark.parametrize("name", ["frozen_by_no_grad", "frozen_by_flag"])
def test_what_is_frozen_is_neither_generated_nor_decayed(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        config = federation(tmp_path, name, HERE, weight_decay=0.1, head_sharing="chunks")
    head = 32 * 4 + 4
    assert {int(row["num_parameters"]) for row in client_rows(config)} == {head}
    kept = load_file(stored(tmp_path) / "personal_model.safetensors")
    kind = ModelKind(f"{HERE}:{name}", 1, 4, CPU, seed=config.run.seed, input_shape=(1, 8, 8))
    fresh = instance_of(kind).model.module.state_dict()
    for key in ("body.0.weight", "body.0.bias"):
        assert torch.equal(kept[key], fresh[key])
    assert not torch.equal(kept["out.weight"], fresh["out.weight"])
    assert rows(config)[-1]["accuracy_micro"] > 0.4
    if name == "frozen_by_no_grad":
        assert "no gradient reaches 2 parameters, body.0.weight among them" in caplog.text


def test_a_frozen_model_trains_privately_and_in_batches(tmp_path: Path) -> None:
    config = federation(tmp_path, "frozen_by_flag", HERE, dp_noise=0.5, rounds=1)
    assert rows(config)[0]["epsilon_max"] > 0
