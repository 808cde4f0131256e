"""The link and a real worker process; only the function that replies is the tests' own."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from client_app.worker.link import Link, WorkerRecord, WorkerUnavailableError
from common.errors import ConfigError, MHpFedHNError


def reply(facts: dict[str, Any], body: bytes) -> bytes:
    """Stand in for the ClientApp, in the worker; the message's type says what to do."""
    what, _, where = facts["message_type"].partition(" ")
    if what == "refuse":
        raise ConfigError("node config: device = 'x' cannot be used.")
    if what == "fail":
        raise KeyError("unexpected")
    if what == "die-once" and not Path(where).exists():
        Path(where).touch()
        os._exit(139)
    if what == "die":
        os._exit(139)
    if what == "log":
        with Path(where).open("a") as file:
            file.write("begin ")
            file.flush()
            time.sleep(float(body))
            file.write("end ")
    return json.dumps([facts["run"], os.getpid()]).encode() + body


FUNCTION = f"{__name__}:{reply.__name__}"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "worker"
    if worker := WorkerRecord.read(tmp_path / "worker"):
        worker.kill()


def ask(folder: Path, message_type: str = "echo", body: bytes = b"", run: int = 1) -> bytes:
    return Link(folder, FUNCTION, {"run": run}, silence_s=15.0).ask(message_type, body)


def pid_of(folder: Path) -> int:
    worker = WorkerRecord.read(folder)
    assert worker is not None
    return worker.pid


def wait_for_end(pid: int) -> None:
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=20)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_one_worker_replies_to_all_messages_of_a_run(folder: Path) -> None:
    body = os.urandom(1 << 20)
    first, second = ask(folder, body=body), ask(folder, body=b"\x00\xff")
    pid = pid_of(folder)
    assert pid != os.getpid()
    assert first == json.dumps([1, pid]).encode() + body
    assert second == json.dumps([1, pid]).encode() + b"\x00\xff"


def test_another_run_gets_another_worker_and_the_old_one_ends(folder: Path) -> None:
    ask(folder)
    old = pid_of(folder)
    assert json.loads(ask(folder, run=2)) == [2, pid_of(folder)]
    assert pid_of(folder) != old
    wait_for_end(old)


def test_an_idle_worker_ends(folder: Path) -> None:
    Link(folder, FUNCTION, {"run": 1}, idle_s=0.1).ask("echo", b"")
    wait_for_end(pid_of(folder))


def test_an_error_of_this_project_comes_back_and_the_worker_stays(folder: Path) -> None:
    with pytest.raises(ConfigError) as found:
        ask(folder, "refuse")
    assert str(found.value) == "node config: device = 'x' cannot be used."
    assert "in reply" in found.value.__notes__[0]
    pid = pid_of(folder)
    assert json.loads(ask(folder)) == [1, pid]


def test_after_any_other_error_the_next_message_gets_a_fresh_worker(folder: Path) -> None:
    with pytest.raises(MHpFedHNError, match="KeyError: 'unexpected'"):
        ask(folder, "fail")
    assert json.loads(ask(folder)) == [1, pid_of(folder)]


def test_messages_at_the_same_time_are_computed_one_after_the_other(folder: Path) -> None:
    log = folder.parent / "log"
    threads = [threading.Thread(target=ask, args=(folder, f"log {log}", b"0.2")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert log.read_text() == "begin end " * 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_a_lost_worker_is_replaced(folder: Path, number: int) -> None:
    ask(folder)
    old = pid_of(folder)
    os.kill(old, number)
    link = Link(folder, FUNCTION, {"run": 1}, silence_s=3.0)
    assert json.loads(link.ask("echo", b"")) == [1, pid_of(folder)]
    assert pid_of(folder) != old
    wait_for_end(old)


def test_a_worker_that_dies_in_a_message_is_replaced_once(folder: Path) -> None:
    assert ask(folder, f"die-once {folder.parent / 'died'}", b"x").endswith(b"x")
    with pytest.raises(WorkerUnavailableError, match="2 workers were lost over one message"):
        ask(folder, "die")


@pytest.mark.parametrize("spoil", [b"", b"{}", b'{"pid": 1}', b"\xff"])
def test_a_damaged_record_costs_only_a_new_worker(folder: Path, spoil: bytes) -> None:
    folder.mkdir()
    (folder / "worker.json").write_bytes(spoil)
    assert json.loads(ask(folder)) == [1, pid_of(folder)]


def test_a_process_that_got_a_lost_workers_pid_is_left_alone() -> None:
    record = WorkerRecord("nowhere", "00", "identity", os.getpid(), created=1.0)
    assert not record.is_alive()
    record.kill()  # would end this test run


def test_who_does_not_know_the_key_is_not_served(folder: Path) -> None:
    ask(folder)
    record = json.loads((folder / "worker.json").read_text())
    (folder / "worker.json").write_text(json.dumps(record | {"key": "00" * 32}))
    assert json.loads(ask(folder))[1] != record["pid"]  # one that cannot be spoken to is replaced


def test_everything_of_the_worker_is_this_users_alone(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    ask(folder)
    mode = partial(Path.stat, follow_symlinks=False)
    assert mode(folder).st_mode & 0o777 == 0o700
    assert mode(folder / "worker.json").st_mode & 0o777 == 0o600
    address = Path(json.loads((folder / "worker.json").read_text())["address"])
    assert mode(address.parent).st_mode & 0o777 == 0o700


def test_a_folder_that_is_not_this_users_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(WorkerUnavailableError, match="is not a folder of this user"):
        ask(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(WorkerUnavailableError, match="cannot be prepared"):
        ask(tmp_path / "file" / "worker")


def test_a_worker_that_cannot_start_says_where_to_look(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerUnavailableError, match=r"no worker starts; .*worker\.log says why"):
        ask(folder)
