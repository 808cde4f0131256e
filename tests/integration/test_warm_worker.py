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
from client_app.worker.link import WorkerRecord
from common.config import TrainingSection
from common.errors import ConfigError
from common.messages import REGISTER, Evaluation, Registration
from common.records import Content, Header, Received, encode
from tests.support import tiny
from tests.support.tiny import tiny_config, trusting

MODEL = f"{tiny.HERE}:normed"


def make_context(folder: Path, run_id: int = 1, **node: Any) -> Context:
    config = tiny_config(folder, models=MODEL).flat()
    settings = {"client-id": "a", "partition-id": 1, "num-partitions": 6, "warm-worker": "on"}
    settings |= {"state-dir": str(folder / "state"), "partition": "pathological"}
    settings |= {"classes-per-client": 2, **trusting(folder, MODEL)}
    settings |= {k.replace("_", "-"): v for k, v in node.items()}
    return Context(run_id, 2, settings, RecordDict(), dict(config))


def ask(context: Context, message_type: str, content: RecordDict) -> RecordDict:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, context.run_id, 2
    message = Message(content, 2, message_type)
    message.metadata.__dict__["_message_id"] = "m"
    return app(message, context).content


HEADER = Header("f", "mh-pfedhn", 1, "n")


def register(context: Context) -> Registration:
    return Registration.read(Received(ask(context, REGISTER, encode(HEADER, Content()))))


def worker_pid(folder: Path) -> int | None:
    worker = WorkerRecord.read(folder / "state" / "a" / "worker")
    return worker and worker.pid


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
    settings = {**TrainingSection(batch_size=16).flat(), "evaluate": True}
    return encode(HEADER, Content(settings, {"theta": theta}))


def test_messages_share_one_worker_and_its_answers_are_those_of_the_process(home: Path) -> None:
    warm = make_context(home)
    assert register(warm).num_parameters == 116
    pid = worker_pid(home)
    replies = [ask(warm, "train.personal", train_content())]
    assert worker_pid(home) == pid
    assert pid not in (None, os.getpid())
    cold = make_context(home, warm_worker="off", state_dir=str(home / "cold"))
    replies.append(ask(cold, "train.personal", train_content()))
    first, second = map(Received, replies)
    assert np.array_equal(first.vector("delta", 116), second.vector("delta", 116))
    assert Evaluation.read(first).num_correct == Evaluation.read(second).num_correct
    warm, plain = (
        list((home / place / "a").glob("personal_buffers@*.safetensors"))
        for place in ("state", "cold")
    )
    assert len(warm) == len(plain) == 1
    assert warm[0].name == plain[0].name
    assert warm[0].read_bytes() == plain[0].read_bytes()


def test_without_a_place_for_it_the_message_is_handled_here(
    tmp_path: Path, warnings_of: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "state" / "a"
    folder.mkdir(parents=True)
    (folder / "worker").write_text("in the way")
    assert register(make_context(tmp_path)).client_id == "a"
    assert "worker cannot be prepared" in warnings_of.text
    assert "handling query.register in process" in warnings_of.text


def test_on_needs_a_state_dir(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="warm-worker = 'on' needs a state-dir"):
        register(make_context(tmp_path, state_dir=""))


def test_auto_gains_nothing_where_torch_is_already_there(tmp_path: Path) -> None:
    assert register(make_context(tmp_path, warm_worker="auto")).client_id == "a"
    assert not (tmp_path / "state" / "a" / "worker").exists()


def test_a_messages_process_imports_no_torch() -> None:
    code = (
        "import sys, client_app.app as a; "
        "print([m for m in ('torch', 'datasets', 'sklearn', 'PIL') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
