"""The worker's loop and the link, over real sockets; only the answering function is the test's."""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, RecordDict

from client_app.worker import serve
from client_app.worker.frames import Frame, receive, send
from client_app.worker.link import Link, Patience, WorkerReplacedError, identity, rebuilt_error
from client_app.worker.place import LOCK, RECORD, SOCKET, Place, WorkerUnavailableError, start_ticks
from client_app.worker.serve import Answer, Worker
from common.errors import ConfigError, MHpFedHNError

NODE = {"client-id": "a"}


def context(run_id: int = 1) -> Context:
    return Context(run_id, 2, dict(NODE), RecordDict(), {"rounds": 3})


def facts(run_id: int = 1) -> dict:
    return {"run_id": run_id, "node_id": 2, "node_config": dict(NODE), "run_config": {"rounds": 3}}


class Host:
    """A worker in a thread of this process, in the place where links look for one."""

    def __init__(self, folder: Path, answer: Answer, idle_s: float) -> None:
        self.folder = folder / "worker"
        self.folder.mkdir(mode=0o700, parents=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.folder / SOCKET))
        self.listener.listen(8)
        self.worker = Worker(self.listener, identity(facts()), answer)
        self.thread = threading.Thread(target=self.worker.run, args=(idle_s,), daemon=True)
        self.thread.start()

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(5.0)
        connection.connect(str(self.folder / SOCKET))
        return connection


StartHost = Callable[..., Host]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[StartHost]:
    hosts: list[Host] = []

    def start(answer: Answer, idle_s: float = 30.0) -> Host:
        hosts.append(Host(tmp_path, answer, idle_s))
        return hosts[-1]

    yield start
    for each in hosts:
        each.worker._jobs.put(None)
        each.thread.join(5.0)


def echo(message_type: str, content: RecordDict, context: Context) -> RecordDict:
    word = content.config_records["config"]["word"]
    if word == "bad value":
        raise ConfigError("node config: device = 'x' cannot be used.")
    if word == "crash":
        raise ValueError("unexpected")
    seen = {"word": word, "type": message_type, "run": context.run_id, "rounds": 3}
    return RecordDict({"config": ConfigRecord(seen)})


def say(word: str) -> RecordDict:
    return RecordDict({"config": ConfigRecord({"word": word})})


def link(tmp_path: Path, run_id: int = 1) -> Link:
    return Link.open(context(run_id), tmp_path, Patience(silence_s=20.0))


def test_the_worker_answers_many_messages(host: StartHost, tmp_path: Path) -> None:
    host(echo)
    for word in ("one", "two", "three"):
        found = link(tmp_path).ask("train.personal", say(word)).config_records["config"]
        assert dict(found) == {"word": word, "type": "train.personal", "run": 1, "rounds": 3}


def test_an_error_keeps_class_and_text_and_the_worker_lives(
    host: StartHost, tmp_path: Path
) -> None:
    started = host(echo)
    with pytest.raises(ConfigError) as caught:
        link(tmp_path).ask("query.register", say("bad value"))
    assert str(caught.value) == "node config: device = 'x' cannot be used."
    assert "in echo" in caught.value.__notes__[0]
    assert link(tmp_path).ask("query.register", say("still here")).config_records
    assert started.thread.is_alive()


def test_after_an_unexpected_error_the_worker_retires(host: StartHost, tmp_path: Path) -> None:
    started = host(echo)
    with pytest.raises(ValueError, match="unexpected"):
        link(tmp_path).ask("train.personal", say("crash"))
    started.thread.join(5.0)
    assert not started.thread.is_alive()
    with socket.socket(socket.AF_UNIX) as knock, pytest.raises(ConnectionRefusedError):
        knock.connect(str(started.folder / SOCKET))


def test_messages_at_the_same_time_are_answered_one_by_one(host: StartHost, tmp_path: Path) -> None:
    inside, most = 0, 0

    def slow(message_type: str, content: RecordDict, _: Context) -> RecordDict:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        inside -= 1
        return content

    host(slow)
    words: list[str] = []
    threads = [
        threading.Thread(
            target=lambda i=i: words.append(
                link(tmp_path).ask("t", say(str(i))).config_records["config"]["word"]
            )
        )
        for i in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
    assert sorted(words) == ["0", "1", "2", "3", "4"]
    assert most == 1


def test_an_oversized_frame_is_refused_and_the_worker_lives(
    host: StartHost, tmp_path: Path
) -> None:
    started = host(echo)
    with started.connect() as connection:
        connection.sendall(struct.pack("!4sIQ", b"MHW1", 2, 1 << 50))
        answer = receive(connection)
    assert answer.header["ok"] is False
    assert "the limit is 1073741824" in answer.header["text"]
    assert link(tmp_path).ask("t", say("fine")).config_records


def test_a_peer_that_says_nothing_does_not_block_others(host: StartHost, tmp_path: Path) -> None:
    started = host(echo)
    with started.connect(), started.connect() as half:
        half.sendall(b"MHW1")
        assert link(tmp_path).ask("t", say("fine")).config_records


def test_work_that_nobody_waits_for_is_not_begun(
    host: StartHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "TICK_S", 0.02)
    begun: list[str] = []
    release = threading.Event()

    def wait(message_type: str, content: RecordDict, _: Context) -> RecordDict:
        begun.append(message_type)
        release.wait(10.0)
        return content

    started = host(wait)
    first, second = started.connect(), started.connect()
    for number, connection in enumerate((first, second)):
        header = {"message_type": str(number), "identity": identity(facts())} | facts()
        send(connection, Frame(header))
        assert receive(connection).header["kind"] == "tick"
    second.close()
    time.sleep(0.2)
    release.set()
    while (answer := receive(first)).header["kind"] == "tick":
        pass
    assert answer.header["ok"] is True
    first.close()
    assert begun == ["0"]


def test_an_idle_worker_ends(host: StartHost) -> None:
    started = host(echo, idle_s=0.1)
    started.thread.join(5.0)
    assert not started.thread.is_alive()


def test_another_run_or_version_replaces_the_worker(host: StartHost, tmp_path: Path) -> None:
    started = host(echo)
    other = link(tmp_path, run_id=2)
    with pytest.raises(WorkerReplacedError) as caught:
        other._exchange(other._request("t", say("x")))
    assert caught.value.pid == os.getpid()
    started.thread.join(5.0)
    assert not started.thread.is_alive()


def test_identity_depends_on_run_and_configs() -> None:
    changed = [facts(2), facts() | {"node_config": {}}, facts() | {"run_config": {"rounds": 4}}]
    assert len({identity(f) for f in [facts(), *changed]}) == 4


def test_the_folder_is_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir(mode=0o755)
    Place.open(tmp_path / "w")
    assert (tmp_path / "w").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "w")
    with pytest.raises(WorkerUnavailableError, match="is not a folder of this user"):
        Place.open(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(WorkerUnavailableError, match="cannot be prepared"):
        Place.open(tmp_path / "file" / "w")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    os.chown(tmp_path / "w", 12345, 12345)
    with pytest.raises(WorkerUnavailableError, match="is not a folder of this user"):
        Place.open(tmp_path / "w")


def test_a_pid_that_was_used_again_is_not_killed(tmp_path: Path) -> None:
    place = Place.open(tmp_path / "w")
    (place.folder / RECORD).write_text(f'{{"pid": {os.getpid()}, "start_ticks": 1}}')
    assert place.running() is None
    place.retire(os.getpid(), kill=True)  # would end this test run
    assert (place.folder / LOCK).exists()


def test_start_ticks_name_a_process() -> None:
    assert start_ticks(os.getpid()) == start_ticks(os.getpid()) != start_ticks(1)
    assert start_ticks(2**22 + 1) is None


@pytest.mark.parametrize(
    ("name", "text", "kind", "again"),
    [
        ("DataError", "no data", "DataError", "no data"),
        ("ValueError", "bad", "ValueError", "bad"),
        ("KeyError", "'x'", "MHpFedHNError", "KeyError: 'x'"),
        ("OutOfMemoryError", "CUDA", "MHpFedHNError", "OutOfMemoryError: CUDA"),
        ("UnicodeDecodeError", "codec", "MHpFedHNError", "UnicodeDecodeError: codec"),
        ("SystemExit", "1", "MHpFedHNError", "SystemExit: 1"),
    ],
)
def test_errors_are_rebuilt_by_name_with_their_text(
    name: str, text: str, kind: str, again: str
) -> None:
    error = rebuilt_error({"error": name, "text": text, "traceback": "Traceback ..."})
    assert type(error).__name__ == kind
    assert str(error) == again
    assert issubclass(MHpFedHNError, Exception)
