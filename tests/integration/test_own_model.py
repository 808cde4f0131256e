"""A participant's own model and data, from the example of the README to the model it owns."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from client_app.personal import PersonalModel
from common.messages import Evaluation
from experiments.examples import my_site
from experiments.run.engines.inprocess import run_inprocess, simulated_nodes
from tests.support.tiny import HERE, run_tiny, tiny_config

EXAMPLE = Path(my_site.__file__)

# Runs without this project: torch, numpy, PIL and the participant's own file.
FRESH = """
import importlib.util, json, pathlib, sys
import numpy as np, torch
from PIL import Image
from safetensors.torch import load_file

def own(path):
    spec = importlib.util.spec_from_file_location("my_site", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def pictures(root):
    classes = sorted(p for p in pathlib.Path(root).iterdir())
    files = [(f, i) for i, c in enumerate(classes) for f in sorted(c.iterdir())]
    return np.stack([np.asarray(Image.open(f)) for f, _ in files]), np.array([i for _, i in files])

site = own(sys.argv[1])
found = {}
for name, (images, labels) in {"scans": site.load_scans(), "photos": pictures(sys.argv[2])}.items():
    folder = pathlib.Path(sys.argv[3]) / name
    facts = json.loads((folder / "personal_model.json").read_text())
    rows = np.load(folder / "test_rows.npy", allow_pickle=False)
    x, y = torch.from_numpy(images[rows]).unsqueeze(1), torch.from_numpy(labels[rows])
    program = torch.export.load(folder / "personal_model.pt2").module()
    correct = int((program(x).argmax(1) == y).sum())
    one_by_one = sum(int(program(x[i : i + 1]).argmax(1) == y[i]) for i in range(len(y)))
    weights = None
    if name == "scans":
        model = site.small_net(in_channels=1, num_classes=facts["num_classes"])
        model.load_state_dict(load_file(folder / "personal_model.safetensors"))
        mean, std = (torch.tensor(facts[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
        weights = int((model.eval()((x / 255 - mean) / std).argmax(1) == y).sum())
    found[name] = [len(y), correct, one_by_one, weights]
ours = [m for m in sys.modules if m.split(".")[0] in ("client_app", "common", "server_app", "flwr")]
print(json.dumps({"found": found, "ours": ours}))
"""


def picture_folder(root: Path) -> Path:
    images, labels = my_site.load_scans()
    for i, (image, label) in enumerate(zip(images[:120], labels[:120], strict=True)):
        folder = root / ("odd" if label % 2 else "even")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of two participants: own model and function; zoo model and picture folder."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(EXAMPLE, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        common = {"state-dir": str(folder / "state"), "partition": "none", "image-size": 32}
        common["global-model"] = f"{HERE}:small"
        photos = {"dataset": "folder", "data-dir": str(picture_folder(folder / "photos"))}
        nodes: list[dict[str, Any]] = [
            {"client-id": "scans", "model": "my_site:small_net", "dataset": "my_site:load_scans"}
            | common,
            {"client-id": "photos", "model": "mlp"} | photos | common,
        ]
        config = tiny_config(
            folder, rounds=4, chunk_size=512, min_clients=2, embedding_std=0.05, server_lr=0.002
        )
        run_tiny(config, node_configs=nodes)
    return folder


def facts(folder: Path, client_id: str) -> dict[str, Any]:
    return json.loads((folder / "state" / client_id / "personal_model.json").read_text())


def test_a_fresh_interpreter_reproduces_the_reported_accuracy(finished: Path) -> None:
    cache = [] if sys.pycache_prefix is None else ["-X", f"pycache_prefix={sys.pycache_prefix}"]
    arguments = [str(finished / p) for p in ("my_site.py", "photos", "state")]
    answer = subprocess.run(
        [sys.executable, "-I", *cache, "-c", FRESH, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=finished,
    )
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert result["ours"] == []
    for client_id in ("scans", "photos"):
        reported = facts(finished, client_id)
        num_test, correct, one_by_one, weights = result["found"][client_id]
        assert num_test == reported["num_test"] > 15
        assert correct == one_by_one == reported["num_correct"]
        assert correct / num_test == reported["test_accuracy"]
        assert weights in (None, correct)


def test_the_description_says_how_to_use_it(finished: Path) -> None:
    scans, photos = facts(finished, "scans"), facts(finished, "photos")
    assert scans["model"] == "my_site:small_net"
    assert scans["load"].startswith("from my_site import small_net as factory; ")
    assert photos["program"] == "personal_model.pt2"
    assert "torch.export.load('personal_model.pt2')" in photos["run"]
    assert (photos["num_classes"], photos["in_channels"]) == (2, 1)


class Branches(nn.Module):
    """A model whose way through depends on the data: torch.export cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        return self.head(x) if float(x.sum()) > 0 else self.head(-x)


def branches(*, in_channels: int, num_classes: int) -> nn.Module:
    return Branches()


def test_a_model_that_cannot_be_exported_keeps_its_weights(tmp_path: Path) -> None:
    from client_app.data.examples import load_client_data
    from client_app.models.instances import pick_device

    config = tiny_config(tmp_path)
    data = load_client_data(config.client, partition_id=0, seed=1, device=pick_device("cpu"))
    name = f"{__name__}:branches"
    path = PersonalModel(name, Branches(), data, Evaluation(20, 5, 1.0)).store(
        tmp_path / "state", program=True
    )
    described = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size > 0
    assert described["program"] is None
    assert described["program_error"]
    assert {p.name for p in path.parent.iterdir()} == {
        "personal_model.safetensors",
        "personal_model.json",
        "test_rows.npy",
    }


def tied(*, in_channels: int, num_classes: int) -> nn.Module:
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.Linear(64, num_classes))


@pytest.mark.parametrize("batched", [0, 6])
def test_every_participant_owns_its_program(tmp_path: Path, batched: int) -> None:
    """Six threads finish at once; the models' layers share weights."""
    name, state = f"{__name__}:tied", tmp_path / "state"
    config = tiny_config(
        tmp_path, method="mh-pfedhn-pg", validation_fraction=0.1, models=name, global_model=name,
        max_in_flight=0, buffer_size=0, server_rule="kernel", state_dir=str(state),
    )  # fmt: skip
    run_inprocess(config, simulated_nodes(6), workers=6, batched_clients=batched)
    for client in range(6):
        folder = state / str(client)
        described = json.loads((folder / "personal_model.json").read_text())
        assert described["program"], described["program_error"]
        model = tied(in_channels=1, num_classes=4)
        model.load_state_dict(load_file(folder / "own_model.safetensors"))
