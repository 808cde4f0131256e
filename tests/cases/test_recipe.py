"""What a participant decides itself: which parameters are shared, and how they are trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from safetensors.torch import load_file
from torch import Tensor, nn

from client_app.models.building import ModelKind, built, trainable
from client_app.personal import read_predictor
from client_app.shelf import Shelf
from common.config import NodeConfig, TrainingSection
from common.errors import ConfigError, ModelError
from experiments.__main__ import main
from tests.support.joining import checked, settings
from tests.support.outputs import rows
from tests.support.tiny import Handler, Wrapped, run_tiny, tiny_config, trusting

HERE = __name__
CPU = torch.device("cpu")


class Pretrained(nn.Module):
    """A backbone with BatchNorm that somebody trained elsewhere, and a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        )
        self.head = nn.Linear(32, classes)
        generator = torch.Generator().manual_seed(5)
        for x in self.backbone.state_dict().values():
            if x.is_floating_point():
                x.copy_(torch.rand(x.shape, generator=generator) + 0.1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images).flatten(1))


def pretrained(*, in_channels: int, num_classes: int) -> nn.Module:
    return Pretrained(num_classes)


class LoRA(nn.Module):
    """A frozen layer and a product of two thin matrices beside it (arXiv 2106.09685)."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Linear(layer.in_features, rank, bias=False)
        self.b = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.b(self.a(x))


def adapted(*, in_channels: int, num_classes: int) -> nn.Module:
    layers = [LoRA(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, num_classes)]
    return nn.Sequential(nn.Flatten(), *layers)


def node(folder: Path, model: str, **own: Any) -> dict[str, Any]:
    return {
        "client-id": "a", "partition-id": 0, "state-dir": str(folder / "state"),
        **trusting(folder, model), **own,
    }  # fmt: skip


@pytest.mark.parametrize("method", ["mh-pfedhn", "mh-pfedhn-pg", "fedavg"])
def test_only_what_is_named_is_generated_and_changes(tmp_path: Path, method: str) -> None:
    model = f"{HERE}:pretrained"
    config = tiny_config(tmp_path, method=method, server_rule="kernel", rounds=3,
                         validation_fraction=0.1, measure_alone=True)  # fmt: skip
    sizes = []

    def look(message: Message, context: Context, handler: Handler) -> Message:
        reply = handler(message, context)
        for record in reply.content.array_records.values() if reply.has_content() else ():
            sizes.extend(array.shape for array in record.values())
        return reply

    own = node(tmp_path, model, generate="head.*")
    run_tiny(config, node_configs=[own], app=Wrapped(look))
    assert (132,) in sizes, "what goes up is the head alone"
    before = pretrained(in_channels=1, num_classes=4).state_dict()
    name = "own_model" if method == "mh-pfedhn-pg" else "personal_model"
    after = load_file(tmp_path / "state" / "a" / f"{name}.safetensors")
    assert after.keys() == before.keys(), "it is a whole model"
    for key, value in before.items():
        changed = not torch.equal(after[key], value)
        assert changed == key.startswith("head."), key


def test_what_is_frozen_is_stored_once(tmp_path: Path) -> None:
    """On the shelf two versions share it; what is exported has it."""
    model = f"{HERE}:pretrained"
    config = tiny_config(tmp_path, method="mh-pfedhn-pg", server_rule="kernel", rounds=4,
                         validation_fraction=0.1)  # fmt: skip
    run_tiny(config, node_configs=[node(tmp_path, model, generate="head.*")])
    state = tmp_path / "state" / "a"
    (home,) = (state / "models").iterdir()
    (frozen,) = home.glob("frozen-*")
    versions = [path for path in home.iterdir() if path.is_dir()]
    assert frozen.stat().st_nlink == 1 + len(versions)
    assert frozen.stat().st_mode & 0o077 == 0
    for version in versions:
        assert "own.backbone.0.weight" not in load_file(version / "personal_model.safetensors")
    before = read_predictor(Shelf(state).find("last").folder)[0].state_dict()
    out = tmp_path / "out"
    assert main(["model", "export", str(state), str(out), "--last"]) == 0
    module, about = read_predictor(out)
    assert "frozen" not in about
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    plain = pretrained(in_channels=1, num_classes=4)
    plain.load_state_dict(load_file(out / "own_model.safetensors"))
    built = pretrained(in_channels=1, num_classes=4).state_dict()
    assert torch.equal(plain.state_dict()["backbone.0.weight"], built["backbone.0.weight"])


def test_an_adapter_is_shared_and_its_layer_stays(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, server_rule="kernel", rounds=2)
    run_tiny(config, node_configs=[node(tmp_path, f"{HERE}:adapted")])
    after = load_file(tmp_path / "state" / "a" / "personal_model.safetensors")
    kind = ModelKind(f"{HERE}:adapted", 1, 4, CPU, seed=config.run.seed, input_shape=(1, 8, 8))
    assert set(trainable(built(kind, 0))) == {"1.a.weight", "1.b.weight", "3.weight", "3.bias"}
    assert after["1.b.weight"].abs().max() > 0
    text = f"{HERE}:adapted"
    adapters = built(ModelKind(text, 1, 4, CPU, generate="*.a.*, *.b.*"), 0)
    assert set(trainable(adapters)) == {"1.a.weight", "1.b.weight"}


def test_a_pattern_that_names_nothing_is_refused(tmp_path: Path) -> None:
    kind = ModelKind(f"{HERE}:pretrained", 1, 4, CPU, generate="classifier.*")
    with pytest.raises(ModelError, match=r"names none of its parameters, which are backbone.0"):
        built(kind, 0)
    own = {"model": f"{HERE}:pretrained", "generate": "head.*", "dataset": "digits"}
    good, text = checked(settings(tmp_path, **own))
    assert good, text
    assert ":pretrained, 330 parameters" in text, "of ten classes, the head's"


def test_a_participant_trains_by_its_own_recipe(tmp_path: Path) -> None:
    """It wins over what the run proposes, and over the participant's own caps."""

    def run(folder: Path, **own: Any) -> float:
        config = tiny_config(folder, server_rule="kernel", rounds=3, local_epochs=1)
        run_tiny(config, node_configs=[node(folder, "tests.support.tiny:small", **own)])
        return float(rows(config)[-1]["train_loss"])

    plain = run(tmp_path / "plain")
    assert run(tmp_path / "much", **{"local-epochs": 60, "learning-rate": 0.1}) < plain / 3
    assert run(tmp_path / "adamw", **{"optimizer": "adamw", "learning-rate": 1e-9}) > plain


def test_caps_hold_for_what_the_server_asks_alone() -> None:
    own = NodeConfig.parse({"client-id": "a", "max-local-epochs": 3, "batch-size": 2000})
    asked = TrainingSection(local_epochs=2, batch_size=16, learning_rate=0.5)
    got = own.training(asked)
    assert (got.local_epochs, got.batch_size, got.learning_rate) == (2, 2000, 0.5)
    with pytest.raises(ConfigError, match="asks for local-epochs = 4"):
        own.training(asked.model_copy(update={"local_epochs": 4}))
    with pytest.raises(ConfigError, match="local-epochs = 0 cannot be used"):
        NodeConfig.parse({"client-id": "a", "local-epochs": 0})
    with pytest.raises(ConfigError, match="optimizer = 'lion' cannot be used"):
        NodeConfig.parse({"client-id": "a", "optimizer": "lion"})
