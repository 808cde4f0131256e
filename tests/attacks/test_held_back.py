"""A server that wants to say which examples of a participant are held back, and compared on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from PIL import Image

from client_app.data.examples import load_client_data
from client_app.data.own import FolderSource
from client_app.models.instances import instance_of
from client_app.participant import Participant, reply_to
from common.config import ClientSection, RunConfig
from common.errors import ConfigError, DataError
from common.messages import EVALUATE, THETA
from common.records import Content, Header, encode
from tests.cases.test_pictures import grey
from tests.support.tiny import HERE, run_tiny, tiny_config, trusting


def write_pictures(folder: Path, classes: str) -> None:
    """Twenty grey pictures of noise in a folder for each class."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def at_a_site(folder: Path, run: dict[str, Any], own: dict[str, Any]) -> Context:
    """Return what a participant of its own has of a run with an architecture for itself."""
    config = RunConfig().with_overrides({"method": "mh-pfedhn", "models": "mlp"} | run)
    own = {"client-id": "a", "state-dir": str(folder / "state"), "device": "cpu"} | own
    own |= {"cache-dir": str(folder / "cache")}
    return Context(1, 1, own, RecordDict(), config.with_overrides({"server-lr": 0.01}).flat())


def evaluate(folder: Path, server_round: int, run: dict[str, Any], own: dict[str, Any]) -> None:
    context = at_a_site(folder, run, own)
    theta = instance_of(Participant.open(context).kind_of("mlp")).model.theta
    asked = Header("a1", "mh-pfedhn", server_round, "n")
    reply_to(EVALUATE, encode(asked, Content({}, {THETA: theta.detach().numpy()})), context)


@pytest.mark.parametrize(
    ("own", "run", "changed"),
    [
        ({}, {"dataset": "folder"}, {"dataset": "digits"}),
        ({}, {"dataset": "folder"}, {"channels": 3}),
        ({"dataset": "digits", "partition-id": 0}, {}, {"classes-per-client": 1}),
        ({"dataset": "digits", "partition-id": 0}, {}, {"seed": 8}),
    ],
)
def test_a_federation_goes_on_with_the_same_examples(
    tmp_path: Path, own: dict[str, Any], run: dict[str, Any], changed: dict[str, Any]
) -> None:
    write_pictures(tmp_path / "scans", "ab")
    own |= {} if own else {"data-dir": str(tmp_path / "scans")}
    run = {"num-partitions": 3, "classes-per-client": 4, **run}
    evaluate(tmp_path, 1, run, own)
    (key,) = changed
    with pytest.raises(ConfigError, match=f"this run says {key} = .* the participant sets {key}"):
        evaluate(tmp_path, 2, {**run, **changed}, own)
    evaluate(tmp_path, 3, {**run, "local-epochs": 2}, own)
    if key != "seed":
        evaluate(tmp_path, 4, {**run, **changed}, own | changed)  # its own affair


def test_a_server_does_not_say_what_is_held_back(tmp_path: Path) -> None:
    """It could train on what another run, or another seed, validates."""
    own = trusting(tmp_path, f"{HERE}:small") | {"state-dir": str(tmp_path / "state")}
    own.pop("split-seed")
    node = {"client-id": "a", "partition-id": 0, **own}
    held = []
    for seed in (1, 2):
        config = tiny_config(
            tmp_path / str(seed), rounds=1, seed=seed, test_fraction=0.1 * seed,
            validation_fraction=0.0, partition="none",
        )  # fmt: skip
        run_tiny(config, node_configs=[node])
        rows = np.load(tmp_path / "state" / "a" / "test_rows.npy")
        held.append(rows.tolist())
    assert held[0] == held[1]
    assert len(held[0]) == 72, "by the participant's own fractions"
    secret = tmp_path / "state" / "a" / "split-seed"
    assert secret.stat().st_mode & 0o077 == 0
    assert int(secret.read_text()) > 2


def test_nor_does_the_order_of_its_class_names(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", "abc")

    def held_back(names: str, most: int = 0) -> set[bytes]:
        own = {"dataset": "folder", "data-dir": str(tmp_path / "pictures"), "partition": "none"}
        own |= {"cache-dir": str(tmp_path / "cache"), "class-names": names, "image-size": 8}
        section = ClientSection.checked({**own, "max-client-examples": most}, "x")
        settings = {"partition_id": 0, "seed": len(names), "split_seed": 5}
        data = load_client_data(section, device=torch.device("cpu"), **settings)
        found = torch.cat([data.test_images, data.validation_images])
        return {picture.numpy().tobytes() for picture in found}

    for most in (0, 31):
        wanted = held_back("a,b,c", most)
        assert len(wanted) == round((most or 60) * 0.25)
        assert held_back("c,a,b", most) == held_back("z,b,y,a,c", most) == wanted


def test_nor_do_names_of_classes_that_are_those_of_its_parts(tmp_path: Path) -> None:
    for part, names in (("train", "abc"), ("test", "ab")):
        for name in names:
            grey(tmp_path / part / name / "1.png", 5)
    assert FolderSource(tmp_path).read(8).about["class_names"] == ["a", "b", "c"]
    with pytest.raises(DataError, match="a, b, c is no class of this federation"):
        FolderSource(tmp_path, ("train", "test")).read(8)
