"""The contract: written, handed out with the keys, held against a site's data, and run."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.common.config import parse_config_args

from common.config import NodeConfig, RunConfig
from common.errors import ConfigError
from experiments.__main__ import main
from experiments.deploy.contract import Contract
from experiments.deploy.settings import JoinSettings
from tests.cases import test_tensors
from tests.support import tiny
from tests.support.joining import checked

Capture = pytest.CaptureFixture[str]
AGREED = {"name": '"patterns"', "server": '"127.0.0.1:9"', "class-names": '"a, b, c, d, e"',
          "image-size": "8", "least-examples": "100", "channels": "1"}  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """What the operator hands to site-a: made by the commands that the documents name."""
    contract = tmp_path / "federation.toml"
    assert main(["contract", "new", str(contract)]) == 0
    change(contract, **AGREED)
    words = ["--host", "127.0.0.1", "--site", "site-a", "--contract", str(contract)]
    assert main(["certs", str(tmp_path / "certs"), *words]) == 0
    folder = tmp_path / "site-a"
    shutil.copytree(tmp_path / "certs" / "site-a", folder)
    return folder


def change(contract: Path, **values: str) -> None:
    text = contract.read_text()
    for name, value in values.items():
        text, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", text)
        assert count == 1, name
    contract.write_text(text)


def joined(bundle: Path, **own: Any) -> JoinSettings:
    code = {"model": f"{tiny.HERE}:small", "dataset": f"{tiny.HERE}:patterns"}
    places = {"state-dir": "state", "cache-dir": "cache"}
    values = {"client-id": "site-a", "bundle": "site-a", **code, **places, **own}
    return JoinSettings.parse(values, bundle.parent)


def test_four_lines_are_enough_to_join(bundle: Path) -> None:
    found = joined(bundle)
    assert found.server == "127.0.0.1:9"
    assert found.certificate == bundle / "ca.crt"
    assert found.key == bundle / "supernode"
    assert found.node["image-size"] == 8
    assert found.node["max-local-epochs"] == 50
    node = NodeConfig.parse(found.node)
    assert node.client_section(RunConfig().client).class_names == "a, b, c, d, e"
    good, text = checked(found)
    assert good, text
    assert "contract     of patterns, 5 classes, pictures" in text
    assert "none to train of class e" in text, "it takes part with all outputs"


def test_what_the_participant_says_itself_wins_where_it_may(bundle: Path) -> None:
    own = joined(bundle, server="other:1", **{"max-local-epochs": 2})
    assert (own.server, own.node["max-local-epochs"]) == ("other:1", 2)
    with pytest.raises(ConfigError, match=r"image-size = 16, but the contract of patterns says 8"):
        joined(bundle, **{"image-size": 16})
    (bundle / "ca.crt").unlink()
    with pytest.raises(ConfigError, match=r"lacks ca\.crt; it has federation\.toml, supe"):
        joined(bundle)


@pytest.mark.parametrize(
    ("changes", "dataset", "words"),
    [
        ({"least-examples": "999"}, f"{tiny.HERE}:patterns", "999 to train on are agreed on"),
        ({"input": '"float32 30"'}, f"{tiny.HERE}:patterns", "float32 30 are agreed on, here pict"),
        ({}, f"{test_tensors.__name__}:cancer", "pictures are agreed on, here float32"),
        ({"input": '"float32 4x8"'}, f"{test_tensors.__name__}:cancer", "shape (4, 8) are agreed"),
        ({"class-names": '"a, b, c"'}, f"{tiny.HERE}:patterns", "a label is 3, but class-names"),
    ],
)
def test_data_that_do_not_meet_it_are_refused(
    bundle: Path, changes: dict[str, str], dataset: str, words: str
) -> None:
    change(bundle / "federation.toml", **changes)
    good, text = checked(joined(bundle, dataset=dataset, model="perceptron"))
    assert not good
    assert words in text


def white() -> tuple[np.ndarray, np.ndarray]:
    """The patterns, as a scanner that inverts them has them."""
    images, labels = tiny.patterns()
    return 255 - images, labels


def shares() -> tuple[np.ndarray, np.ndarray]:
    """The patterns as floats from 0 to 1."""
    images, labels = tiny.patterns()
    return (images / 255).astype(np.float32), labels


def twelve_bits() -> tuple[np.ndarray, np.ndarray]:
    images, labels = tiny.patterns()
    return images.astype(np.uint16) * 16, labels


DARK, TWELVE = {"background": '"dark"'}, {"intensity": '"0..4095"'}


@pytest.mark.parametrize(
    ("agreed", "source", "own", "words"),
    [
        (
            DARK,
            "white",
            "",
            'a light background, and a dark one is agreed on: set intensity = "255',
        ),
        (DARK, "white", "255..0", ""),
        ({"background": '"light"'}, "white", "", ""),
        (TWELVE, "twelve_bits", "", ""),
        (TWELVE | DARK, "twelve_bits", "4095..0", 'set intensity = "0..4095" in your own file'),
        (TWELVE, "shares", "", 'they would be all alike. Set intensity = "0..0'),
        (TWELVE | DARK, "shares", "0..1", ""),
        (TWELVE, "white", "", 'the pictures have 8 bits, 0 to 255. Set intensity = "0..255"'),
        (
            {"intensity": '"0..8"'},
            "twelve_bits",
            "",
            'nearly all lie outside of intensity = "0.',
        ),
        (DARK, "shares", "", "here float32 (floats that are pictures need intensity"),
        (DARK, "twelve_bits", "", "or have an intensity, as '0..4095'"),
    ],
)
def test_what_black_and_white_mean_is_agreed_on(
    bundle: Path, agreed: dict[str, str], source: str, own: str, words: str
) -> None:
    """A site whose pictures are not as agreed is told what to set; with that it meets it."""
    change(bundle / "federation.toml", **agreed)
    site = {"intensity": own} if own else {}
    good, text = checked(joined(bundle, dataset=f"{__name__}:{source}", **site))
    assert good == (not words), text
    assert words in " ".join(text.split())
    assert "intensity" not in Contract.read(bundle / "federation.toml").run_config()


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_brought_to_what_is_agreed(bundle: Path, channels: int) -> None:
    """Grey pictures and coloured ones take part in one federation."""
    change(bundle / "federation.toml", **{"channels": str(channels), "image-size": "32"})
    for dataset in ("patterns", "coloured_patterns"):
        found = joined(bundle, dataset=f"{tiny.HERE}:{dataset}", model="cnn")
        good, text = checked(found)
        assert good, text
        assert f"each {channels}x32x32" in text


def test_tables_meet_a_contract_of_tables(bundle: Path) -> None:
    change(bundle / "federation.toml", **{"input": '"float32 30"', "class-names": '"sick, well"'})
    dataset = f"{test_tensors.__name__}:cancer"
    good, text = checked(joined(bundle, dataset=dataset, model="perceptron"))
    assert good, text
    assert "contract     of patterns, 2 classes, float32 30" in text


def test_a_run_gets_its_keys(bundle: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert main(["contract", "run", str(bundle / "federation.toml")]) == 0
    printed = capsys.readouterr().out.strip()
    config = RunConfig.parse(parse_config_args([f"{printed} rounds=3"]))
    assert config.client.class_names == "a, b, c, d, e"
    assert (config.client.image_size, config.run.rounds) == (8, 3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"input": "float32"}, 'must be "pictures" or as "float32 3x40"'),
        ({"input": "words 3"}, 'must be "pictures" or as'),
        ({"global-model": "mine:net"}, "global-model must be a built-in one"),
        ({"class-names": "a, a"}, "two or more different names"),
        ({"chanels": 3}, "channels"),
        ({"background": "grey"}, "background = 'grey' cannot be used"),
        ({"intensity": "255"}, 'must be two different numbers, as "0..4095"'),
        ({"intensity": "7..7"}, "must be two different numbers"),
        ({"intensity": "0..nan"}, "must be two different numbers"),
    ],
)
def test_a_contract_that_cannot_be_used_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        Contract.checked(values, "federation.toml")
