"""Messages start by a fork of a process that has Flower imported, or alone: the same effect."""

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from experiments.starter import message
from experiments.starter.program import Starter, install_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and SO_PEERCRED")


def run_program(folder: Path, *words: str, name: str = message.CLIENT) -> tuple[int, str]:
    """Run the installed program as Flower does: its output is a file, its end is not waited for."""
    output = folder / "output"
    with output.open("wb") as file:
        program = install_program(folder, name) / name
        code = subprocess.run([program, *words], stdout=file, stderr=file, check=False).returncode
    deadline = time.monotonic() + 60
    while "usage" not in output.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    return code, output.read_text()


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize("name", [message.CLIENT, message.SERVER])
def test_one_start_imports_no_node_and_no_link(name: str) -> None:
    code = (
        f"import sys; sys.argv = ['message.py', '{name}', '--help']\n"
        "import experiments.starter.message as message\n"
        "try: message.main()\n"
        "except SystemExit: print([m for m in sys.modules if m.endswith(('.cli.flower_supernode',"
        " '.cli.flower_superlink'))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"usage: {name}" in found.stdout
    assert "--runtime-api-address" in found.stdout
    assert found.stdout.strip().endswith("[]")


def test_forked_messages_run_flowers_command_and_a_lost_starter_costs_only_time(
    tmp_path: Path,
) -> None:
    folder = tmp_path / ("a b" * 60)  # longer than a Unix socket's address may be
    folder.mkdir()
    with Starter(folder, os.environ) as starter:
        place = folder / "bin"
        for words in (["--help"], ["--no-such-flag"]):
            code, output = run_program(folder, *words)
            assert code == 0  # the message's process is the starter's child, not the program
            assert ("--runtime-api-address" if words == ["--help"] else "is required") in output
        descriptor = os.open(place, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(f"/proc/self/fd/{descriptor}/{message.CLIENT}.sock")
            rude.sendall(b"\xff" * 100)
        os.close(descriptor)
        assert "--runtime-api-address" in run_program(folder, "--help")[1]
        process = psutil.Process(starter.pid)
        assert process.num_threads() == 1 or os.environ.get("OMP_NUM_THREADS") != "1"
        process.kill()
        process.wait(10)
        assert "--runtime-api-address" in run_program(folder, "--help")[1]
    assert place.stat().st_mode & 0o777 == 0o700
    assert "a request of" in (folder / "starter.log").read_text()


def test_starter_and_running_messages_end_with_their_owner(tmp_path: Path) -> None:
    """Kill -9 of the owner, while a message waits for a server that never answers."""
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from experiments.starter.program import Starter\n"
        "starter = Starter(Path(sys.argv[1]), os.environ).__enter__()\n"
        "print(starter.pid, flush=True)\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner,
        ExitStack() as stack,
    ):
        stack.callback(owner.kill)
        assert owner.stdout is not None
        starter = psutil.Process(int(owner.stdout.readline()))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        program = tmp_path / "bin" / message.CLIENT
        wait_for(program.with_suffix(".sock"))
        subprocess.run(
            [program, "--runtime-api-address", address, "--token", "none", "--insecure"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
        )
        silent.settimeout(60)
        with silent.accept()[0]:  # the message runs
            family = [starter, *starter.children()]
            assert len(family) == 2
            owner.kill()
            owner.wait()
            assert psutil.wait_procs(family, timeout=30)[1] == []
