"""What leaves a deployed participant: no path and no layer name, whatever fails."""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from client_app.app import app
from client_app.outgoing import without_paths
from common.errors import MHpFedHNError
from common.records import Content, Header, encode
from tests.support.tiny import HERE, run_tiny, tiny_config


def lost_data() -> Any:
    raise FileNotFoundError("/srv/hospital a/scans/patient-17.png")


def odd_model(*, in_channels: int, num_classes: int) -> nn.Module:
    raise RuntimeError("size mismatch for encoder.block3.weight in /home/ann/net.py")


NODE = {
    "client-id": "a",
    "partition-id": 0,
    "dataset": f"{HERE}:patterns",
    "model": f"{HERE}:small",
    "global-model": f"{HERE}:small",
    "warm-worker": "off",
}


def failure(folder: Path, **declared: Any) -> str:
    """Ask a participant to register; return what its error says."""
    node = NODE | {k.replace("_", "-"): v for k, v in declared.items()}
    context = Context(1, 2, node, RecordDict(), dict(tiny_config(folder).flat()))
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # Flower's process's
    header = Header("f", tiny_config(folder).run.method, 1, "n")
    message = Message(encode(header, Content()), 2, "query.register")
    with pytest.raises(MHpFedHNError) as caught:
        app(message, context)
    assert caught.value.__suppress_context__
    return str(caught.value)


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"dataset": f"{__name__}:lost_data"}, "DataError on the participant's side"),
        ({"model": f"{__name__}:odd_model"}, "ModelError on the participant's side"),
        (
            {"dataset": "folder", "data_dir": "/srv/hospital a/scans"},
            "DataError on the participant's side",
        ),
        ({"state_dir": "/proc/hospital a/state"}, "state-dir <state-dir> cannot be created"),
        ({"dataset": "/srv/scans:load"}, "DataError on the participant's side"),
        (
            {"partition": "pathological", "classes_per_client": 10**6},
            "DataError on the participant's side",
        ),
    ],
)
def test_errors_name_no_path_and_no_layer(
    tmp_path: Path, declared: dict[str, Any], says: str
) -> None:
    text = failure(tmp_path, **declared)
    assert says in text
    for secret in ("/srv", "/home", "/proc", "hospital", "patient", "encoder", str(tmp_path)):
        assert secret not in text, text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("cannot read '/a/b.png': no", "cannot read '<path>': no"),
        ("~/x/y and C:\\data\\z", "<path> and <path>"),
        ("bytes/s of 3/4 at https://x.org/a", "bytes/s of 3/4 at https://x.org/a"),
        ("/my data/in/x.png is cut", "<data-dir> is cut"),
        ("our scans/7.png is cut", "<cache-dir> is cut"),
        ("cannot import hospital.nets:make", "cannot import <model>"),
        ("\\\\nas\\scans\\7.png", "<state-dir>"),
        ("client a.b: dataset digits", "client a.b: dataset digits"),
    ],
)
def test_absolute_paths_are_replaced(text: str, left: str) -> None:
    declared = {
        "data-dir": "/my data", "cache-dir": "our scans", "state-dir": "\\\\nas\\scans",
        "model": "hospital.nets:make", "client-id": "a.b", "dataset": "digits", "dp-noise": 1.5,
    }  # fmt: skip
    assert without_paths(text, declared) == left


def test_the_end_of_a_run_tells_a_name_alone(tmp_path: Path) -> None:
    told: list[str] = []

    def note(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "query.finish":
            told.append(str(reply.content.config_records["config"]["location"]))
        return reply

    state = str(tmp_path / "state")
    nodes = [
        NODE | {"client-id": f"c{i}", "partition-id": i, "num-partitions": 6, "state-dir": state}
        for i in range(2)
    ]
    run_tiny(tiny_config(tmp_path, rounds=1), node_configs=nodes, app=note)
    assert told == ["personal_model.safetensors"] * 2
