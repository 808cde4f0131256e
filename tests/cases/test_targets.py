"""What participants predict beside a class: several labels, numbers, and from several inputs."""

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from sklearn.metrics import r2_score
from torch import Tensor, nn

from client_app.data.examples import load_client_data
from client_app.data.labels import read_labels
from client_app.data.several import packed, take_apart
from client_app.personal import read_predictor
from client_app.predictor import choose_weight, mixture
from client_app.shelf import LAST, Shelf
from client_app.training.loop import distilled, loss_of, num_correct
from common.config import ClientSection
from common.errors import DataError, RunError
from experiments.__main__ import main
from experiments.run.engines.inprocess import run_inprocess, simulated_nodes
from tests.support.joining import checked, settings
from tests.support.outputs import rows
from tests.support.targets import HERE, KINDS, diabetes, federation, visits
from tests.support.tiny import run_tiny, trusting

Capture = pytest.CaptureFixture[str]


# --- a federation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_federation_learns_what_its_labels_are(kind: str, tmp_path: Path) -> None:
    config = federation(tmp_path, kind)
    run_tiny(config)
    last, wanted = rows(config)[-1], KINDS[kind][2]
    assert last["accuracy_micro"] > wanted
    assert {"accuracy_own", "accuracy_common", "accuracy_alone"} <= last.keys()


@pytest.mark.parametrize("method", ["mh-pfedhn-gd", "fedprox", "local-ensemble"])
def test_other_methods_take_numbers_too(method: str, tmp_path: Path) -> None:
    config = federation(
        tmp_path, "numbers", method=method, server_rule="adam", evaluate_every=4, rounds=4
    )
    run_tiny(config)
    assert 0 < rows(config)[-1]["accuracy_micro"] < 1


def test_clients_with_numbers_are_batched_too(tmp_path: Path) -> None:
    found = []
    for name, batched in (("one", 0), ("batched", 3)):
        config = federation(tmp_path / name, "numbers", rounds=3, evaluate_every=1)
        run_inprocess(config, simulated_nodes(3), batched_clients=batched)
        found.append([row["accuracy_micro"] for row in rows(config)])
    assert found[0] == pytest.approx(found[1], abs=1e-3)


@pytest.mark.parametrize("method", ["fedproto", "fml", "fd", "fedgh"])
def test_a_method_made_of_classes_says_so(method: str, tmp_path: Path) -> None:
    config = federation(tmp_path, "numbers", method=method, server_rule="adam")
    with pytest.raises(RunError, match=r"is for classes; .*diabetes has numbers"):
        run_tiny(config)


def test_numbers_are_not_divided_by_class(tmp_path: Path) -> None:
    config = federation(tmp_path, "numbers", partition="dirichlet")
    with pytest.raises(RunError, match=r"no classes\. Set partition = 'iid'"):
        run_tiny(config)


# --- a participant's own model --------------------------------------------------------------------


def run_alone(folder: Path, kind: str) -> None:
    """Let one deployed participant, which has all of the data, train; it keeps its models."""
    source, factory, _ = KINDS[kind]
    own = trusting(folder, f"{HERE}:{factory.__name__}")
    own |= {"dataset": f"{HERE}:{source.__name__}", "partition": "none", "global-model": "auto"}
    node = {"client-id": "a", "state-dir": str(folder / "s"), **own}
    run_tiny(federation(folder, kind, num_partitions=1), node_configs=[node])


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_that_is_kept_predicts_in_the_units_of_the_labels(
    kind: str, tmp_path: Path, capsys: Capture
) -> None:
    found = KINDS[kind][0]()
    inputs, labels = (found["inputs"], found["labels"]) if isinstance(found, dict) else found
    state, held, exported = (tmp_path / name for name in ("s/a", "held.npz", "exported"))
    run_alone(tmp_path, kind)
    version = Shelf(state).find(LAST)
    module, about = read_predictor(version.folder)
    assert about["target"] == kind
    if kind == "numbers":
        assert about["label_mean"][0] == pytest.approx(diabetes()[1].mean(), rel=0.2)
    parts = inputs if isinstance(inputs, dict) else {"inputs": inputs}
    np.savez(held, **parts, labels=labels)
    assert main(["model", "evaluate", str(state), str(held), "--last"]) == 0
    out = tmp_path / "out.csv"
    assert main(["model", "predict", str(state), str(held), str(out), "--last"]) == 0
    assert main(["model", "export", str(state), str(exported), "--last", "--onnx"]) == 0
    shown = capsys.readouterr().out
    row = torch.from_numpy(packed(inputs)[0].astype(np.float32))
    with torch.no_grad():
        said = module(row)
    program = torch.export.load(exported / "personal_model.pt2").module()
    torch.testing.assert_close(program(row), said, rtol=1e-4, atol=1e-4)
    onnx = onnxruntime.InferenceSession(exported / "personal_model.onnx")
    (found,) = onnx.run(None, {onnx.get_inputs()[0].name: row.numpy()})
    both = torch.from_numpy(found), said
    if kind == "labels":  # the odds of what is certain are as good as infinite
        both = both[0].sigmoid(), said.sigmoid()
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-3)
    lines = list(csv.reader(out.read_text().splitlines()))
    assert len(lines) == 1 + len(labels)
    if kind == "numbers":
        explained = r2_score(labels, said[:, 0].numpy())
        assert explained > 0.3
        assert f"{explained:.3f}" in shown
        assert float(lines[1][1]) == pytest.approx(float(said[0, 0]), rel=1e-4)
    elif kind == "labels":
        right = ((said > 0).numpy() == labels).mean()
        assert f"accuracy          {right:.3f}" in shown
        assert lines[0][:2] == ["row", "p(0)"]
    else:
        assert "AUC" in shown
        assert "calibration error" in shown
        assert lines[1][1] == str(int(said[0].argmax()))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("numbers", "1 number(s) to predict (0: mean 1"),
        ("labels", "5 labels, each there or not"),
        ("classes", "4 classes"),
    ],
)
def test_the_check_says_what_the_labels_are(kind: str, words: str, tmp_path: Path) -> None:
    source, factory, _ = KINDS[kind]
    values = {"model": f"{HERE}:{factory.__name__}", "dataset": f"{HERE}:{source.__name__}"}
    good, text = checked(settings(tmp_path, **values, **{"cache-dir": str(tmp_path / "cache")}))
    assert good, text
    assert words in text


def test_private_training_refuses_numbers(tmp_path: Path) -> None:
    """Also to train without having registered: one example would change the labels of all."""
    own = trusting(tmp_path, f"{HERE}:mlp") | {"dataset": f"{HERE}:diabetes", "partition": "none"}
    own |= {"dp-noise": 3.0, "global-model": "auto"}
    node = {"client-id": "a", "state-dir": str(tmp_path / "s"), **own}
    with pytest.raises(RunError, match=r"cannot protect numbers|DataError on the participant's"):
        run_tiny(federation(tmp_path, "numbers", method="mh-pfedhn"), node_configs=[node])
    section = ClientSection.checked(
        {
            "dataset": f"{HERE}:diabetes",
            "dp-noise": 1.0,
            "partition": "none",
            "cache-dir": str(tmp_path),
        },
        "x",
    )
    with pytest.raises(DataError, match="cannot protect numbers"):
        load_client_data(section, partition_id=0, seed=0, device=torch.device("cpu"))


# --- what labels may look like --------------------------------------------------------------------


def test_labels_are_told_by_type_and_shape() -> None:
    told = {
        "int": (read_labels(np.arange(4), 4), np.int64, (4,)),
        "bool": (read_labels(np.array([True, False]), 2), np.int64, (2,)),
        "several": (read_labels(np.array([[1, 1], [0, 1]]), 2), np.bool_, (2, 2)),
        "float": (read_labels(np.linspace(0, 1, 5), 5), np.float32, (5, 1)),
        "table": (read_labels(np.random.default_rng(0).normal(size=(5, 3)), 5), np.float32, (5, 3)),
        "said": (read_labels([1.0, 2.0], 2, "numbers"), np.float32, (2, 1)),
        "said classes": (read_labels([1.0, 2.0], 2, "classes"), np.int64, (2,)),
    }
    for name, (found, dtype, shape) in told.items():
        assert (found.dtype, found.shape) == (dtype, shape), name


@pytest.mark.parametrize(
    ("labels", "target", "words"),
    [
        ([0.0, 1.0, 2.0], "", "Are they classes"),
        (np.eye(3, dtype=int), "", "Are they a class each"),
        ([0.5, np.nan, 1.0], "", "no finite number"),
        ([[2, 0], [1, 1], [0, 0]], "labels", "0 or 1 each"),
        (["a", "b", "c"], "", "labels are texts, a, b, c. Number them"),
        (np.eye(3, dtype=bool), "", "Are they a class each"),
        ([-1, 0, 1], "", "a label is -1"),
        ([0, 1], "", "must be integers from 0"),
        ([0, 1, 2], "regression", "target"),
    ],
)
def test_labels_that_might_be_either_are_asked_for(labels: Any, target: str, words: str) -> None:
    with pytest.raises(DataError, match=re.escape(words)):
        read_labels(labels, 3, target)


def test_several_inputs_come_apart_as_they_were_put_together() -> None:
    inputs = visits()["inputs"]
    row, parts = packed({**inputs, "photo": np.full((480, 2, 2), 255, np.uint8)})
    assert (row.shape, row.dtype) == ((480, 36 + 5 + 7 + 4), np.float32)

    class Seen(nn.Module):
        def forward(self, **named: Tensor) -> Tensor:
            self.named = named
            return named["table"]

    module = take_apart(Seen(), parts)
    module(torch.from_numpy(row))
    assert module.named["words"].dtype == torch.int64
    for name, x in inputs.items():
        np.testing.assert_allclose(module.named[name].numpy(), x, rtol=1e-6)
    assert bool((module.named["photo"] == 1).all())
    with pytest.raises(DataError, match="one entry each"):
        packed({"a": np.zeros((2, 3)), "b": np.zeros((3, 3))})
    with pytest.raises(DataError, match="above 16,777,216"):
        packed({"a": np.full((2, 3), 2**25)})


# --- the mathematics, against the plain formulas --------------------------------------------------


@pytest.mark.numeric
def test_losses_scores_and_mixtures_are_those_of_their_kind() -> None:
    torch.manual_seed(0)
    own, common = torch.randn(2, 40, 3)
    several, numbers = torch.rand(40, 3) > 0.5, torch.randn(40, 3)
    plain = nn.functional.binary_cross_entropy(own.sigmoid(), several.float())
    torch.testing.assert_close(loss_of(own, several), plain)
    each = loss_of(own, several, reduction="none")
    torch.testing.assert_close(each.mean(), plain)
    torch.testing.assert_close(loss_of(own, numbers), nn.functional.mse_loss(own, numbers))
    found = num_correct(numbers + 0.1 * own, numbers) / 40
    assert found == pytest.approx(r2_score(numbers, numbers + 0.1 * own), rel=1e-5)
    assert num_correct(own * 9, numbers) == 0  # worse than the mean
    constant = torch.ones(4, 1)
    assert num_correct(constant, constant) == 4
    assert num_correct(constant * 0, constant) == 0
    mixed = mixture(own, common, 0.25, "labels")
    torch.testing.assert_close(mixed.sigmoid(), 0.25 * own.sigmoid() + 0.75 * common.sigmoid())
    torch.testing.assert_close(mixture(own, common, 0.25, "numbers"), 0.25 * own + 0.75 * common)
    assert choose_weight(numbers + own, numbers - own, numbers) == 0.5
    assert choose_weight(torch.where(several, 4.0, -4.0), common, several) == 1


@pytest.mark.numeric
def test_a_teacher_of_each_kind_pulls_towards_itself() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 3)
    zero = torch.zeros(6)
    for labels in (torch.ones(6).long(), torch.ones(6, 3).bool(), torch.ones(6, 3)):
        settings = {"alpha": 1.0, "temperature": 2.0}
        none = distilled(teacher, teacher, labels, zero, **settings)
        torch.testing.assert_close(none, zero, atol=1e-6, rtol=0)
        free = student.clone().requires_grad_()
        distilled(free, teacher, labels, zero, **settings).sum().backward()
        nearer = distilled(free.detach() - 0.1 * free.grad, teacher, labels, zero, **settings)
        assert bool((nearer < distilled(student, teacher, labels, zero, **settings)).all())
