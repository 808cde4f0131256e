"""The ClientApp with a real worker process: the same answers, recovery from whatever ends it."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client_app.app import app
from client_app.worker import link as link_module
from client_app.worker.link import Patience
from client_app.worker.place import Place
from common import wire
from common.config import TrainingSection
from common.errors import ConfigError, DataError
from tests.support import tiny
from tests.support.tiny import tiny_config

MODEL = f"{tiny.HERE}:normed"
CRASH_ONCE = "MH_PFEDHN_TEST_CRASH_ONCE"


def crashes_once() -> tuple[Any, Any]:
    """A participant's data whose first call ends its process like a segmentation fault."""
    marker = Path(os.environ[CRASH_ONCE])
    if marker.exists():
        marker.unlink()
        os._exit(139)
    return tiny.patterns()


def make_context(folder: Path, run_id: int = 1, **node: Any) -> Context:
    config = tiny_config(folder, models=MODEL).flat()
    settings = {"client-id": "a", "partition-id": 1, "num-partitions": 6, "warm-worker": "on"}
    settings |= {"state-dir": str(folder / "state"), "partition": "pathological"}
    settings |= {"classes-per-client": 2}
    settings |= {k.replace("_", "-"): v for k, v in node.items()}
    return Context(run_id, 2, settings, RecordDict(), dict(config))


def ask(context: Context, message_type: str, content: RecordDict) -> RecordDict:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, context.run_id, 2
    message = Message(content, 2, message_type)
    message.metadata.__dict__["_message_id"] = "m"
    return app(message, context).content


def register(context: Context) -> wire.Registration:
    content = wire.encode_query(wire.Header("f", 1))
    return wire.decode_registration(ask(context, "query.register", content), "reply")


def worker_pid(folder: Path) -> int | None:
    return Place(folder / "state" / "a" / "worker").running()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("worker")
    yield folder
    pid = worker_pid(folder)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("flwr")
    kept, logger.propagate = logger.propagate, True
    caplog.set_level(logging.WARNING)
    yield caplog
    logger.propagate = kept


def train_content() -> RecordDict:
    theta = np.random.default_rng(0).normal(0, 0.1, size=116).astype(np.float32)
    task = wire.TrainTask(wire.Header("f", 1), TrainingSection(batch_size=16), theta, evaluate=True)
    return wire.encode_train_task(task)


def test_messages_share_one_worker_and_its_answers_are_those_of_the_process(home: Path) -> None:
    warm = make_context(home)
    assert register(warm).num_parameters == 116
    pid = worker_pid(home)
    replies = [ask(warm, "train.personal", train_content())]
    assert worker_pid(home) == pid
    assert pid not in (None, os.getpid())
    cold = make_context(home, warm_worker="off", state_dir=str(home / "cold"))
    replies.append(ask(cold, "train.personal", train_content()))
    first, second = (
        wire.decode_train_reply(r, num_parameters=116, num_global_parameters=0, source="s")
        for r in replies
    )
    assert first.delta is not None
    assert second.delta is not None
    assert np.array_equal(first.delta, second.delta)
    assert first.evaluation is not None
    assert second.evaluation is not None
    assert first.evaluation.num_correct == second.evaluation.num_correct
    warm, plain = (
        list((home / place / "a").glob("personal_buffers@*.safetensors"))
        for place in ("state", "cold")
    )
    assert len(warm) == len(plain) == 1
    assert warm[0].name == plain[0].name
    assert warm[0].read_bytes() == plain[0].read_bytes()


def test_an_error_in_the_worker_is_the_same_error(home: Path) -> None:
    bad = wire.encode_query(wire.Header("f", 1))
    bad.config_records["config"]["protocol-version"] = 9
    found = []
    for mode in ("on", "off"):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            ask(make_context(home, warm_worker=mode), "query.register", bad)
        found.append((type(caught.value), str(caught.value)))
    assert found[0] == found[1]
    assert "protocol version 9; expected 1" in found[0][1]


def test_a_killed_worker_is_replaced(home: Path) -> None:
    register(make_context(home))
    pid = worker_pid(home)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert register(make_context(home)).client_id == "a"
    assert worker_pid(home) not in (None, pid)


def test_a_worker_that_hangs_is_killed_and_replaced(
    home: Path, monkeypatch: pytest.MonkeyPatch, warnings_of: pytest.LogCaptureFixture
) -> None:
    register(make_context(home))
    pid = worker_pid(home)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    short = Patience(silence_s=0.5)
    real = link_module.Link._recover

    def patient_again(self: link_module.Link, error: OSError, *, last: bool) -> None:
        real(self, error, last=last)
        object.__setattr__(self, "patience", Patience())

    monkeypatch.setattr("client_app.app.Patience", lambda **_: short)
    monkeypatch.setattr(link_module.Link, "_recover", patient_again)
    assert register(make_context(home)).client_id == "a"
    assert worker_pid(home) not in (None, pid)
    assert "gave no sign of life; starting another" in warnings_of.text


def test_a_worker_that_dies_in_a_message_is_replaced_and_the_message_answered(
    home: Path, monkeypatch: pytest.MonkeyPatch, warnings_of: pytest.LogCaptureFixture
) -> None:
    marker = home / "crash"
    marker.touch()
    monkeypatch.setenv(CRASH_ONCE, str(marker))
    context = make_context(home, run_id=2, dataset=f"{__name__}:crashes_once")
    assert register(context).num_parameters == 116
    assert not marker.exists()
    assert "was lost" in warnings_of.text
    assert worker_pid(home) is not None


def test_another_run_gets_another_worker(home: Path) -> None:
    register(make_context(home, run_id=3))
    first = worker_pid(home)
    register(make_context(home, run_id=4))
    assert worker_pid(home) not in (None, first)


def test_without_a_place_for_it_the_message_is_handled_here(
    tmp_path: Path, warnings_of: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "state" / "a"
    folder.mkdir(parents=True)
    (folder / "worker").write_text("in the way")
    assert register(make_context(tmp_path)).client_id == "a"
    assert "is not a folder of this user" in warnings_of.text
    assert "handling query.register in process" in warnings_of.text


def test_on_needs_a_state_dir(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="warm-worker = 'on' needs a state-dir"):
        register(make_context(tmp_path, state_dir=""))


def test_auto_gains_nothing_where_torch_is_already_there(tmp_path: Path) -> None:
    assert register(make_context(tmp_path, warm_worker="auto")).client_id == "a"
    assert not (tmp_path / "state" / "a" / "worker").exists()


def test_data_errors_come_back_from_the_worker(home: Path) -> None:
    context = make_context(home, run_id=5, dataset="folder", data_dir=str(home / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere is not a folder"):
        register(context)


def test_a_messages_process_imports_no_torch() -> None:
    code = (
        "import sys, client_app.app as a; "
        "print([m for m in ('torch', 'datasets', 'sklearn', 'PIL') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
