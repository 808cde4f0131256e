"""Programs of models: the weights of each, whether its like was exported before or not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from client_app import program
from client_app.program import save_program


class Scaled(nn.Module):
    """A layer with BatchNorm, a buffer that no state_dict has, and a number."""

    def __init__(self, seed: int, factor: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layer, self.norm, self.factor = nn.Linear(4, 3), nn.BatchNorm1d(3), factor
        self.register_buffer("offset", torch.randn(3, generator=generator), persistent=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(3, 4, generator=generator))
            self.norm.running_mean.copy_(torch.randn(3, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)) * self.factor + self.offset


class Drawn(nn.Module):
    """Multiplies by a tensor that is no buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.drawn = torch.randn(3, generator=torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.drawn


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(9))


def saved(module: nn.Module, path: Path, maker: str) -> Tensor:
    save_program((module.eval(), X[:2]), path, lambda _: None, maker=maker)
    return torch.export.load(path).module()(X)


def test_each_program_has_its_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_KNOWN", {})
    exports = []
    export = torch.export.export
    monkeypatch.setattr(
        torch.export, "export", lambda *a, **k: exports.append(1) or export(*a, **k)
    )
    models = [Scaled(1), Scaled(2), Scaled(3, factor=2.0)]
    for i, (model, maker) in enumerate(zip(models, ("a", "a", "b"), strict=True)):
        torch.testing.assert_close(saved(model, tmp_path / f"{i}.pt2", maker), model(X))
    assert len(exports) == 2  # the second is the first with other weights
    first = torch.export.load(tmp_path / "0.pt2").module()(X)
    torch.testing.assert_close(first, models[0](X))


def test_what_holds_more_than_weights_is_exported_each_time(tmp_path: Path) -> None:
    for seed in (1, 2):
        model = Drawn(seed)
        torch.testing.assert_close(saved(model, tmp_path / "a.pt2", "drawn"), model(X))


def test_a_process_keeps_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_KNOWN", {})
    monkeypatch.setattr(program, "MOST_KNOWN", 2)
    for maker in "abc":
        saved(Scaled(1), tmp_path / "a.pt2", maker)
    assert [key[0] for key in program._KNOWN] == ["b", "c"]
