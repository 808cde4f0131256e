"""The command line itself: what it lists, completes, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import COMMANDS, main, parser
from tests.support.tiny import run_tiny, tiny_config

Capture = pytest.CaptureFixture[str]


def test_what_can_be_run_is_listed_for_programs(capsys: Capture) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "five architectures" in found["presets"]["quickstart"]
    assert found["studies"].keys() >= {"study-a-homogeneous", "study-k-different"}


def test_a_run_is_shown_to_programs(tmp_path: Path, capsys: Capture) -> None:
    run_tiny(tiny_config(tmp_path, rounds=1))
    capsys.readouterr()
    assert main(["show", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "completed"
    assert 0 < found["last"]["accuracy_micro"] < 1


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_words_are_completed(shell: str, capsys: Capture) -> None:
    assert main(["completion", shell]) == 0
    found = capsys.readouterr().out
    assert all(word in found for word in [*COMMANDS, "--reference", "--watch"])
    if shell == "bash":
        subprocess.run([shell, "-n"], input=found, text=True, check=True)


def test_every_command_says_what_it_is_for(capsys: Capture) -> None:
    for build in (parser(), parser("")):
        with pytest.raises(SystemExit):
            build.parse_args(["--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert all(f"{name} {about}" in shown for name, (about, _) in COMMANDS.items())


def test_nobody_has_to_read_to_the_end() -> None:
    command = f"{sys.executable} -m experiments completion zsh | head -1"
    found = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("#compdef")
    assert found.stderr == ""
