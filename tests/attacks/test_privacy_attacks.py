"""What `mh-pfedhn attack` finds out from a tiny run that memorises, and from one that must not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client_app.models.instances import FlatModel
from client_app.privacy import Privacy
from client_app.training.loop import label_loss
from common.errors import RunError
from experiments.__main__ import main
from experiments.attacks.federation import OWN, Federation, trained_on
from experiments.attacks.inversion import best_order, psnr, ssim
from experiments.attacks.membership import judged, likelihood_ratio, matched
from experiments.report.runs import Run
from tests.support.tiny import run_tiny, tiny_config

HERE = "tests.attacks.test_privacy_attacks"
CLASSES = 4


def noise() -> tuple[np.ndarray, np.ndarray]:
    """240 pictures of nothing: what is known of one's label was learned by heart."""
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (240, 8, 8)).astype(np.uint8), np.arange(240) % CLASSES


class Memory(torch.nn.Module):
    """One hidden layer over all pixels, wide enough to learn a few dozen pictures by heart."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.hidden = torch.nn.Linear(64, 128)
        self.head = torch.nn.Linear(128, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.hidden(images.flatten(1))))


def memory(*, in_channels: int, num_classes: int) -> torch.nn.Module:
    return Memory(num_classes)


def made(folder: Path, **overrides: Any) -> Path:
    """Run four clients with two classes each."""
    settings: dict[str, Any] = {
        "dataset": f"{HERE}:noise", "models": f"{HERE}:memory", "global_model": f"{HERE}:memory",
        "method": "mh-pfedhn-pg", "server_rule": "kernel", "partition": "dirichlet",
        "dirichlet_alpha": 0.5, "min_client_examples": 12, "num_partitions": 4, "rounds": 4,
        "local_epochs": 8, "validation_fraction": 0.1, "test_fraction": 0.4, "momentum": 0.5,
        "max_in_flight": 0, "buffer_size": 0, "evaluate_every": 4,
    }  # fmt: skip
    run_tiny(tiny_config(folder, **{**settings, **overrides}), num_clients=4)
    return folder / "run"


@pytest.fixture(scope="module")
def open_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("open"))


@pytest.fixture(scope="module")
def private_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Its noise, and that of the attacked answers, is the same every time: no test is lucky."""
    draws = np.random.default_rng(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Privacy, "generator", lambda _: draws)
        yield made(tmp_path_factory.mktemp("private"), dp_noise=20.0, rounds=2)


def attacked(name: str, run: Path, *words: str) -> list[dict[str, Any]]:
    assert main(["attack", name, str(run), *words]) == 0
    rows: list[dict[str, Any]] = json.loads((run / f"attack-{name}.json").read_text())["rows"]
    return rows


def test_membership_shows_where_models_memorise(open_run: Path) -> None:
    rows = {(r["seen_by"], r["score"]): r["auc"] for r in attacked(
        "membership", open_run, "--shadows", "4")}  # fmt: skip
    for score in ("loss, own", "loss, common", "gradient alignment, own", "LiRA, own"):
        assert rows["server", score] > 0.6, f"{score}: {rows}"
    assert rows["another participant", "loss, common"] > 0.55


def test_membership_does_not_show_under_noise(private_run: Path) -> None:
    rows = attacked("membership", private_run, "--shadows", "4")
    assert all(row["auc"] < 0.62 for row in rows), rows


def test_labels_show_in_the_last_layer(open_run: Path) -> None:
    errors = {row["guess"]: row["l1_error"] for row in attacked("labels", open_run)}
    assert errors["colluding clients"] < 0.7 * errors["mean of the others"]
    assert all(0 <= error <= 2 for error in errors.values())


def test_a_picture_comes_back_from_one_step(open_run: Path) -> None:
    (row,) = attacked("inversion", open_run, "--clients", "1", "--steps", "200")
    assert row["psnr_db"] > row["psnr_db_of_the_mean_picture"] + 3
    assert row["ssim"] > 0.5 > row["ssim_of_the_mean_picture"]
    assert (open_run / "attack-inversion.png").stat().st_size > 100


def test_noise_hides_the_picture(private_run: Path) -> None:
    (row,) = attacked("inversion", private_run, "--clients", "1", "--steps", "200")
    assert row["psnr_db"] < row["psnr_db_of_the_mean_picture"] + 1


def test_likeness_follows_the_labels(open_run: Path) -> None:
    rows = attacked("likeness", open_run)
    assert {row["clients"] for row in rows} == {4}
    assert all(-1 <= row["correlation"] <= 1 for row in rows)
    assert max(row["correlation"] for row in rows) > 0.3


def test_an_impostor_is_refused_while_the_name_is_held(open_run: Path) -> None:
    answers = {r["situation"]: r["the_impostor"] for r in attacked("impersonate", open_run)}
    assert answers.pop("the victim is away, no keys").startswith("is admitted")
    assert set(answers.values()) == {"is refused"}


def test_an_attack_answers_with_other_settings(open_run: Path) -> None:
    found = attacked("inversion", open_run, "--clients", "1", "--steps", "1", "--set", "dp-noise=1")
    assert json.loads((open_run / "attack-inversion.json").read_text())["settings"]["dp-noise"]
    assert len(found) == 1


def test_what_cannot_be_attacked_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tiny(tiny_config(tmp_path, method="fedavg", models="mlp", rounds=1, image_size=32))
    assert main(["attack", "labels", str(tmp_path / "run")]) == 2
    assert "attacks are made for mh-pfedhn and mh-pfedhn-pg" in capsys.readouterr().err


def test_measures_are_what_they_are_called() -> None:
    truth = torch.tensor([True] * 100 + [False] * 100)
    perfect = judged(truth.double(), truth)
    assert perfect == {"auc": 1.0, "tpr_at_fpr_1_percent": 1.0}
    pictures = torch.rand(3, 1, 16, 16, dtype=torch.float64)
    assert psnr(pictures, pictures) == pytest.approx(100)
    assert psnr(torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.1)) == pytest.approx(20)
    assert ssim(pictures, pictures) == pytest.approx(1)
    assert ssim(pictures, pictures.roll(1, 0)) < 0.5
    assert best_order(pictures, pictures[[2, 0, 1]]) == (1, 2, 0)


def test_labels_alone_tell_nothing_of_membership() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (300,), generator=generator)
    members = torch.rand(300, generator=generator) < 0.2 + 0.15 * labels  # more of some
    rows = matched(labels, members)
    assert len(rows) > 50
    assert judged(labels[rows].double(), members[rows])["auc"] == pytest.approx(0.5)
    assert judged(labels.double(), members)["auc"] > 0.6


def test_likelihood_ratio_tells_the_shadows_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    had_it = torch.rand(20, 50, generator=generator) < 0.5
    confidences = had_it * 2.0 + torch.randn(20, 50, generator=generator)
    members = torch.arange(50) < 25
    scores = likelihood_ratio(members * 2.0, confidences, had_it)
    assert judged(scores, members)["auc"] > 0.95


def test_the_delta_that_is_attacked_is_the_clients_own(open_run: Path) -> None:
    """One step on one picture: the delta is the rate times the gradient, by hand."""
    federation = Federation(Run.load(open_run), {})
    data = trained_on(federation.participant("0").data, torch.tensor([0]))
    answer = federation.answer("0", data, batch_size=1, local_epochs=1)
    model = FlatModel(Memory(CLASSES))
    model.load(answer.sent[OWN])
    section = federation.config.training
    logits = model.module(data.normalise(data.train_images))
    model.backward(label_loss(logits, data.train_labels, section))
    wanted = section.learning_rate * (model.gradient + section.weight_decay * answer.sent[OWN])
    rest = answer.delta[OWN] - wanted  # the teacher's part is small
    assert float(rest.norm() / wanted.norm()) < 0.1


def test_a_run_of_real_sites_is_refused(open_run: Path) -> None:
    federation = Federation(Run.load(open_run), {})
    client = federation.registry.client("0")
    federation.registry.restore([{**vars(client), "client_id": "hospital-a"}])
    with pytest.raises(RunError, match="its clients' data are not here"):
        federation.clients()
