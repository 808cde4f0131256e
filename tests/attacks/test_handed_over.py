"""What somebody hands over, or lies where a command is typed: read, never run, and bounded."""

import io
import json
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from client_app.data.augment import own_augmentation
from client_app.data.losses import own_loss
from client_app.models.registry import build_model
from client_app.outgoing import outgoing_error
from client_app.personal import PersonalModel
from client_app.shelf import DESCRIPTION, Shelf
from common.errors import MHpFedHNError
from common.files import MOST_READ
from common.messages import Evaluation
from experiments.__main__ import main
from experiments.deploy.contract import Contract
from experiments.deploy.settings import JoinSettings
from tests.cases.test_pictures import grey
from tests.unit.client_app.pictures import client_data

SOURCE = """
from pathlib import Path
from torch import nn
(Path(__file__).parent / "ran").touch()

def net(*, in_channels, num_classes):
    # our unpublished trick
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 32 * 32, num_classes))
"""
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def path_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


def handed_over(folder: Path, module: str) -> tuple[Path, Path]:
    """Return a participant's folder whose model names code, and the folder of that code."""
    code, state, data = folder / "code", folder / "state", client_data(num_train=12)
    code.mkdir()
    (code / f"{module}.py").write_text(SOURCE)
    found = Evaluation(num_test=4, num_correct=2, test_loss=1.0, seconds=0.0)
    facts = {"round": 1, "validation_accuracy": 0.5, "num_validation": 30}
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    kept = PersonalModel("mlp", net, data, found, "", facts)
    Shelf(state).keep(kept, "a1", 1, program=False)
    for path in state.rglob(DESCRIPTION):
        about = json.loads(path.read_text())
        about |= {"model": f"{module}:net", "code": [str(code)]}
        path.write_text(json.dumps(about))
    grey(folder / "pictures" / "a" / "1.png", 5)
    return state, code


@pytest.mark.parametrize("action", ["predict", "evaluate", "export"])
def test_a_models_code_is_run_where_its_folder_is_named(
    tmp_path: Path, action: str, capsys: Capture
) -> None:
    state, code = handed_over(tmp_path, f"handed_{action}")
    words = {
        "predict": [str(tmp_path / "pictures"), str(tmp_path / "out.csv")],
        "evaluate": [str(tmp_path / "labelled.npz")],
        "export": [str(tmp_path / "out")],
    }[action]
    pixels = np.zeros((10, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "labelled.npz", inputs=pixels, labels=np.arange(10))
    assert main(["model", action, str(state), *words]) == 2
    assert "--code FOLDER" in capsys.readouterr().err
    assert not (code / "ran").exists()
    assert main(["model", action, str(state), *words, "--code", str(code)]) == 0
    assert (code / "ran").exists()


def test_an_exported_model_tells_nothing_of_its_source(tmp_path: Path) -> None:
    state, code = handed_over(tmp_path, "handed_source")
    out = tmp_path / "out"
    (next(state.rglob(DESCRIPTION)).parent / "link").symlink_to("/etc/hostname")
    words = [str(state), str(out), "--onnx", "--code", str(code)]
    assert main(["model", "export", *words]) == 0
    found = b"".join(path.read_bytes() for path in out.iterdir() if path.suffix != ".json")
    for told in (b"unpublished", b"handed_source", b"program.py", str(tmp_path).encode()):
        assert told not in found, told
    assert str(tmp_path) not in (out / DESCRIPTION).read_text()
    assert not (out / "link").exists()
    assert torch.export.load(out / "personal_model.pt2")


class Evil:
    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.ran,)


def test_a_strangers_program_is_neither_run_nor_handed_on(tmp_path: Path) -> None:
    """Torch runs what is pickled in a weight of it."""
    state, code = handed_over(tmp_path, "handed_program")
    (honest, out, ran) = (tmp_path / name for name in ("honest", "out", "evil"))
    words = ["--code", str(code)]
    assert main(["model", "export", str(state), str(honest), *words]) == 0
    version, packed = next(state.rglob(DESCRIPTION)).parent, io.BytesIO()
    torch.save(Evil(ran), packed)
    with (
        zipfile.ZipFile(honest / "personal_model.pt2") as mine,
        zipfile.ZipFile(version / "personal_model.pt2", "w") as theirs,
    ):
        (listed,) = (n for n in mine.namelist() if n.endswith("model_weights_config.json"))
        about = json.loads(mine.read(listed))
        weight = next(iter(about["config"].values()))
        weight["use_pickle"] = True
        for name in mine.namelist():
            bad = name.endswith(f"/{weight['path_name']}")
            content = packed.getvalue() if bad else mine.read(name)
            theirs.writestr(name, json.dumps(about) if name == listed else content)
    with suppress(Exception):
        torch.export.load(version / "personal_model.pt2")
    assert ran.exists(), "it is one that runs code"
    ran.unlink()
    described = json.loads((version / DESCRIPTION).read_text())
    described |= {"run": "evil()", "load": "evil()", "program": "personal_model.pt2"}
    (version / DESCRIPTION).write_text(json.dumps(described))
    (version / "evil.py").write_text("evil")
    assert main(["model", "export", str(state), str(out), *words]) == 0
    torch.export.load(out / "personal_model.pt2")
    assert not ran.exists()
    assert (out / "personal_model.pt2").read_bytes() == (honest / "personal_model.pt2").read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in honest.iterdir()}
    assert "evil" not in (out / DESCRIPTION).read_text()


def test_a_folder_is_not_searched_for_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture folder may hold a file of the name of one that some library looks for."""
    monkeypatch.chdir(tmp_path)
    for words in (["model", "list", "nowhere"], ["status", "nowhere"], ["keys"]):
        main(words)
        assert str(tmp_path) not in sys.path
    assert main(["run", "nothing-there"]) == 2
    assert str(tmp_path) in sys.path


@pytest.mark.parametrize("key", ["augmentation", "loss"])
def test_own_code_of_any_kind_is_found_by_the_supernode(tmp_path: Path, key: str) -> None:
    values = {"client-id": "a", "server": "x:1", "insecure": True, key: "my_lab:made",
              "state-dir": str(tmp_path)}  # fmt: skip
    settings = JoinSettings.parse(values, tmp_path)
    assert str(tmp_path) in settings.environment()["PYTHONPATH"]


def test_a_server_is_not_told_what_own_code_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_lab.py").write_text("raise ImportError('licence of patients SN-4711')")
    for make in (
        lambda: own_augmentation("broken_lab:turned"),
        lambda: own_augmentation("my_private_toolkit:turned"),
        lambda: own_loss("broken_lab:focal", torch.zeros(3).long(), "classes", 2),
    ):
        with pytest.raises(MHpFedHNError) as raised:
            make()
        told = str(outgoing_error(raised.value, {"client-id": "a"}, {}))
        assert not any(word in told for word in ("SN-4711", "lab", "toolkit", str(tmp_path)))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04nothing", b"\x93NUMPY\x01\x00\xff\xff"])
def test_a_file_that_is_none_is_said(tmp_path: Path, content: bytes, capsys: Capture) -> None:
    shelf, data = Shelf(tmp_path / "state"), client_data(num_train=12)
    found = Evaluation(num_test=4, num_correct=2, test_loss=1.0, seconds=0.0)
    facts: dict[str, Any] = {"validation_accuracy": 0.5, "num_validation": 30}
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    shelf.keep(PersonalModel("mlp", net, data, found, "", facts), "a1", 1, program=False)
    for path in (tmp_path / "state").rglob(DESCRIPTION):  # what builds it is not asked for here
        about = json.loads(path.read_text())
        path.write_text(json.dumps({**about, "model": f"{__name__}:flat"}))
    bad = tmp_path / "bad.npz"
    bad.write_bytes(content)
    words = [str(tmp_path / "state"), str(bad), str(tmp_path / "out.csv")]
    assert main(["model", "predict", *words]) == 2
    assert "bad.npz cannot be read" in "".join(capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("kind", ["link", "device", "large", "brackets", "sizes", "vast"])
def test_a_description_is_read_within_bounds(
    tmp_path: Path, kind: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, data = tmp_path / "state", client_data(num_train=12)
    found = Evaluation(num_test=4, num_correct=2, test_loss=1.0, seconds=0.0)
    model = build_model("mlp", in_channels=3, num_classes=10)
    Shelf(state).keep(PersonalModel("mlp", model, data, found), "a1", 1, program=False)
    path = next(state.rglob(DESCRIPTION))
    about = json.loads(path.read_text())
    path.unlink()
    if kind in ("link", "device"):
        elsewhere = tmp_path / "elsewhere.json"
        elsewhere.write_text(json.dumps(about))
        path.symlink_to(elsewhere if kind == "link" else "/dev/zero")
    else:
        sizes = json.dumps({**about, "num_classes": 10**12})
        texts = {"large": " " * (MOST_READ + 1), "brackets": "[" * 200_000, "sizes": sizes}
        texts["vast"] = json.dumps({**about, "image_size": 100_000})
        path.write_text(texts[kind])
    grey(tmp_path / "pictures" / "a" / "1.png", 5)
    words = [str(state), str(tmp_path / "pictures"), str(tmp_path / "out.csv")]
    assert main(["model", "predict", *words]) == 2
    said = "".join(capsys.readouterr().err.split())
    assert ("nolongerthemodel" if kind == "sizes" else "holdsnomodel") in said


def test_names_of_folders_are_shown_not_obeyed(tmp_path: Path, capsys: Capture) -> None:
    state, _ = handed_over(tmp_path, "handed_names")
    (state / "models" / "a1").rename(state / "models" / "\x1b]0;owned\x07[red]a1")
    assert main(["model", "list", str(state)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "[red]" in said


def flat(*, in_channels: int, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 32 * 32, num_classes))


def test_a_contract_that_lifts_caps_is_told() -> None:
    contract = Contract.checked({"max-local-epochs": 10**9, "image-size": 2048}, "contract")
    own = contract.node_config({"client-id": "a"})
    said = contract.lifted(own)
    assert "max-local-epochs = 1,000,000,000" in said
    assert "image-size = 2,048" in said
    assert "max-batch-size" not in said
    assert contract.lifted({**own, "max-local-epochs": 5}).count("max-") == 0
    assert Contract().lifted(Contract().node_config({})) == ""


def test_brackets_without_end_are_no_toml(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "site.toml").write_text("x = " + "[" * 100_000)
    assert main(["join", str(tmp_path / "site.toml")]) == 2
    assert "is not a TOML file" in "".join(capsys.readouterr().err.splitlines())


def test_a_description_starts_no_program(tmp_path: Path, capsys: Capture) -> None:
    state, _ = handed_over(tmp_path, "handed_program")
    for path in state.rglob(DESCRIPTION):
        path.write_text(json.dumps({**json.loads(path.read_text()), "model": "venv.__main__:main"}))
    words = [str(state), str(tmp_path / "pictures"), str(tmp_path / "out.csv")]
    assert main(["model", "predict", *words]) == 2
    assert "--code FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
