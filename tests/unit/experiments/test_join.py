"""`mh-pfedhn join`: settings, and every check with what is wrong and what to change."""

import argparse
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from filelock import FileLock
from flwr.common.config import parse_config_args

from common.config import NodeConfig
from common.errors import ConfigError, RunError
from experiments.deploy import checks as join_checks
from experiments.deploy import join
from experiments.deploy.join import add_join_parser
from experiments.deploy.settings import JoinSettings, read_settings
from experiments.examples import my_site
from tests.support import tiny
from tests.support.joining import BASIC, checked, settings
from tests.support.one_line_server import OneLineServer


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_join_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["join", *words])


# --- settings ------------------------------------------------------------------------------------


def test_paths_in_the_file_are_relative_to_it_and_a_flag_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "site" / "join.toml"
    file.parent.mkdir()
    example = Path(my_site.__file__).with_suffix(".toml").read_text()
    file.write_text(example)
    bundle = file.parent / "hospital-a"
    bundle.mkdir()
    (bundle / "ca.crt").touch()
    (bundle / "federation.toml").write_text('server = "federation.example.org:8000"\n')
    monkeypatch.chdir(tmp_path)
    found = read_settings(
        arguments(str(file), "--key", "other.key", "--set", "image-size=32", "device=cpu")
    )
    assert found.server == "federation.example.org:8000"
    assert found.certificate == bundle / "ca.crt"
    assert found.key == tmp_path / "other.key"
    assert found.base == file.parent
    assert found.folder == file.parent / "state" / "hospital-a"
    node = NodeConfig.parse(found.node)
    assert (node.image_size, node.device, node.partition) == (32, "cpu", "none")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"modle": "cnn"}, r"join: unknown key 'modle'\. Did you mean 'model'\?"),
        ({"client-id": ""}, r"join: client-id is missing, for instance --client-id hospital-a"),
        ({"server": ""}, r"join: server is missing"),
        ({"key": "k"}, r"insecure means no TLS: remove it, or both certificate and key"),
        ({"image-size": 2}, r"node config: image-size = 2 cannot be used"),
        ({"client-id": "../x"}, r"client-id '\.\./x' cannot name a folder"),
        ({"server-lr": 0.1}, r"join: server-lr belongs to the run config"),
        ({"test-fraction": 0.1}, r"validation-fraction = 0\.1 .* nothing to test on\. Raise"),
        ({"port": "9094"}, r"port = '9094' must be a whole number from 0 to 65535"),
    ],
)
def test_bad_settings_say_what_to_change(tmp_path: Path, changes: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        _ = settings(tmp_path, **changes).folder


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml: No such file"):
        read_settings(arguments(str(tmp_path / "none.toml")))
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(ConfigError, match=r"bad\.toml is not a TOML file"):
        read_settings(arguments(str(tmp_path / "bad.toml")))


def test_flower_reads_back_the_node_config(tmp_path: Path) -> None:
    odd = 'a "b" \\ c = d / é'
    found = settings(tmp_path, **{"data-dir": str(tmp_path / odd), "test-fraction": 0.5})
    found.folder.mkdir(parents=True)
    command = found.command(port=9999)
    read = parse_config_args([command[command.index("--node-config") + 1]])
    assert read == dict(found.node)
    assert "--insecure" in command
    assert "--root-certificates" not in command


def test_the_environment_is_the_participants_own(tmp_path: Path) -> None:
    own = settings(tmp_path, dataset="my_site:load_scans")
    env = own.environment()
    assert env["FLWR_HOME"] == str(own.folder / "flwr")
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["PYTHONPATH"].split(os.pathsep)[-1] == str(tmp_path)
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert settings(tmp_path).environment().get("PYTHONPATH") == os.environ.get("PYTHONPATH")


def test_two_joins_in_one_folder_are_refused(tmp_path: Path) -> None:
    words = ["--client-id", "a", "--server", "b:1", "--insecure", "--state-dir", str(tmp_path)]
    (tmp_path / "a").mkdir()
    with (
        FileLock(tmp_path / "a" / "join.lock"),
        pytest.raises(RunError, match="another `mh-pfedhn join` already runs"),
    ):
        join.run_join(arguments(*words))


# --- keys ----------------------------------------------------------------------------------------


def private_bytes(key: Any) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def test_keys(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    path.write_bytes(private_bytes(ec.generate_private_key(ec.SECP384R1())))
    path.chmod(0o600)
    assert join_checks.check_key(path).detail == f"{path}, secp384r1"
    assert join_checks.check_key(path).warning == ""
    path.chmod(0o644)
    assert f"others can read it (mode 644): chmod 600 {path}" in join_checks.check_key(path).warning
    path.write_bytes(private_bytes(ed25519.Ed25519PrivateKey.generate()))
    with pytest.raises(ConfigError, match=r"Ed25519PrivateKey; Flower needs ECDSA\. Make one: ssh"):
        join_checks.check_key(path)
    path.write_bytes(b"ecdsa-sha2-nistp384 AAAA")
    with pytest.raises(ConfigError, match="is the public key; give the private one"):
        join_checks.check_key(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="no private key in OpenSSH format without passphrase"):
        join_checks.check_key(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        join_checks.check_key(tmp_path / "none")


# --- the whole list ------------------------------------------------------------------------------


def own(folder: Path, **changes: Any) -> JoinSettings:
    values = {"model": f"{tiny.HERE}:normed", "dataset": f"{tiny.HERE}:patterns", "image-size": 8}
    return settings(folder, **(values | {"cache-dir": str(folder / "cache")} | changes))


def test_a_good_participant_passes(tmp_path: Path) -> None:
    with closing(OneLineServer()) as server:
        good, text = checked(own(tmp_path, server=server.address), must_answer=True)
    assert good, text
    assert "360 to train, 48 to validate and 72 to test, 4 classes (" in text, text
    assert ":normed, 116 parameters" in text
    assert "an epoch of 23 batches" in text
    assert text.count("✗") == 0


def test_a_server_that_is_away_fails_only_a_mere_check(tmp_path: Path) -> None:
    assert checked(own(tmp_path))[0] is True
    good, text = checked(own(tmp_path), must_answer=True)
    assert good is False
    assert "✗ server" in text


def test_each_failure_is_shown_and_what_depends_on_it_named(tmp_path: Path) -> None:
    good, text = checked(own(tmp_path, model="cn"))
    assert good is False
    assert "✗ model        unknown model 'cn'. Did you mean 'cnn'?" in text
    assert "✗ training     not checked: needs the model, see above." in text
    good, text = checked(own(tmp_path, model=f"{tiny.HERE}:explodes"))
    assert (
        "✗ training     the model got float32 (16, 1, 8, 8) and raised: this model cannot run"
        in text
    )
    good, text = checked(own(tmp_path, dataset="folder", **{"data-dir": str(tmp_path / "no")}))
    assert good is False
    assert "is not a folder. Give the absolute path" in text


def test_a_model_that_cannot_be_trained_privately_fails(tmp_path: Path) -> None:
    good, text = checked(own(tmp_path, **{"dp-noise": 1.0}))
    assert good is False
    assert "✗ training     Normed has a BatchNorm (norm)" in text
    assert checked(own(tmp_path, model=f"{tiny.HERE}:small", **{"dp-noise": 1.0}))[0]


def from_one() -> tuple[Any, Any]:
    images, labels = tiny.patterns()
    return images, labels + 1


def test_what_is_odd_but_may_be_meant_is_a_warning(tmp_path: Path) -> None:
    good, text = checked(own(tmp_path, dataset=f"{__name__}:from_one"))
    assert good is True
    assert "! data " in text
    assert "none to train of class 0 - nor to test of class 0: do your labels start at 1?" in text
    bare = {"client-id": "a", "server": BASIC["server"], "insecure": True, "state-dir": "state"}
    bare["max-client-examples"] = 60
    good, text = checked(JoinSettings.parse(bare, tmp_path))
    assert good is True, text
    assert "your settings name no dataset: each run says which, 'digits' by default" in text
    assert "your settings name no model: each run says which, 'cnn' by default" in text


def test_a_state_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ["--client-id", "a", "--server", "b:1", "--state-dir", str(tmp_path / "file")]
    with pytest.raises(ConfigError, match=r"file/a cannot be made: Not a directory\. Choose"):
        join.run_join(arguments(*words))
