"""Large pretrained backbones stay at home: the server keeps what is shared, and no more."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torchvision.models import resnet50, vit_b_16

from server_app.output.checkpoint import load_checkpoint
from tests.cases.test_recipe import LoRA
from tests.support.tiny import run_tiny, tiny_config, trusting

HERE = __name__
RESNET, VIT = "BACKBONE_RESNET", "BACKBONE_VIT"
MOST_MB = 60


def scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    labels = np.arange(24) % 4
    pixels = np.random.default_rng(0).integers(0, 90, (24, 8, 8, 3))
    return (pixels + 40 * labels[:, None, None, None]).astype(np.uint8), labels


def trained_head(*, in_channels: int, num_classes: int) -> nn.Module:
    """A ResNet50 from a file, with a head of one's own; `generate` names the head."""
    model = resnet50()
    model.load_state_dict(torch.load(os.environ[RESNET], weights_only=True))
    model.fc = nn.Linear(2048, num_classes)
    return model


def adapted_transformer(*, in_channels: int, num_classes: int) -> nn.Module:
    """A ViT-B from a file, frozen, with adapters beside its hidden layers, and a head."""
    model = vit_b_16()
    model.load_state_dict(torch.load(os.environ[VIT], weights_only=True))
    model.requires_grad_(False)
    for block in model.encoder.layers:
        block.dropout.p = 0.0
        block.mlp[0], block.mlp[3] = LoRA(block.mlp[0], 4), LoRA(block.mlp[3], 4)
    model.heads = nn.Linear(768, num_classes)
    return model


@pytest.mark.slow
def test_the_server_keeps_what_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for name, build in ((RESNET, resnet50), (VIT, vit_b_16)):
        torch.save(build().state_dict(), tmp_path / f"{name}.pt")
        monkeypatch.setenv(name, str(tmp_path / f"{name}.pt"))
    sites = {"trained_head": (64, "fc.*"), "adapted_transformer": (224, "")}
    nodes = [
        {
            "client-id": model, "state-dir": str(tmp_path / "state"), "warm-worker": "off",
            **trusting(tmp_path, f"{HERE}:{model}"), "dataset": f"{HERE}:scans",
            "partition": "none", "image-size": size, "generate": patterns,
        }
        for model, (size, patterns) in sites.items()
    ]  # fmt: skip
    config = tiny_config(tmp_path, server_rule="kernel", rounds=2, batch_size=8)
    run_tiny(config, node_configs=nodes)
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint")
    sizes = {row["client_id"]: row["num_parameters"] for row in checkpoint.meta["registry"]}
    assert sizes["trained_head"] == 4 * 2049
    assert sizes["adapted_transformer"] == 12 * 2 * 4 * (768 + 3072) + 4 * 769
    kept = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert kept < 2 * MOST_MB * 2**20
    for model in sites:
        home = tmp_path / "state" / model
        versions = [*home.glob("models/*/round-*/personal_model.safetensors")]
        assert versions
        assert max(path.stat().st_size for path in versions) < 4 * sizes[model] + 1e6
