import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common import wire
from common.config import DistillSection, TrainingSection
from common.errors import WireError
from common.records import payload_bytes

HEADER = wire.Header("fed", 3)
SOURCE = "reply of client 7 in round 3"


def reply(**overrides: object) -> RecordDict:
    values = {"num_examples": 5, "train_loss": 0.5, "seconds": 0.1}
    delta = np.arange(4, dtype=np.float32)
    return wire.encode_train_reply(
        wire.TrainReply(**{**values, "delta": delta, **overrides}), "float32"
    )


def decode(content: RecordDict) -> wire.TrainReply:
    return wire.decode_train_reply(
        content, num_parameters=4, num_global_parameters=0, source=SOURCE
    )


def test_train_task_survives_the_wire() -> None:
    task = wire.TrainTask(
        header=HEADER,
        training=TrainingSection(batch_size=8),
        theta=np.array([1.0, -2.0], dtype=np.float32),
        global_theta=np.array([3.0], dtype=np.float32),
        train_global=True,
        distill=DistillSection(distill_alpha=0.01),
        evaluate=True,
    )
    back = wire.decode_train_task(wire.encode_train_task(task), SOURCE)
    assert back.header == task.header
    assert back.training == task.training
    assert back.distill == task.distill
    assert (back.train_global, back.evaluate) == (True, True)
    np.testing.assert_array_equal(back.theta, task.theta)
    np.testing.assert_array_equal(back.global_theta, task.global_theta)


def test_train_reply_survives_the_wire() -> None:
    evaluation = wire.Evaluation(10, 4, 0.7, 0.2)
    back = decode(reply(evaluation=evaluation))
    np.testing.assert_array_equal(back.delta, [0, 1, 2, 3])
    assert (back.num_examples, back.train_loss, back.evaluation) == (5, 0.5, evaluation)
    assert payload_bytes(reply()) >= 16


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (np.zeros(3, np.float32), r"delta has shape \(3,\); expected \(4,\).*Did the model change"),
        (np.zeros((2, 2), np.float32), r"delta has shape \(2, 2\); expected \(4,\)"),
        (np.array([0, np.nan, 0, 0], np.float32), "delta has 1 of 4 entries that are NaN"),
        (
            np.array([0, np.inf, 0, 0], np.float32),
            "delta has 1 of 4 entries that are NaN",
        ),
        (np.zeros(4, np.float64), "delta has dtype float64; expected float32, float16, uint16"),
    ],
)
def test_bad_delta_is_refused_and_says_from_whom(delta: np.ndarray, message: str) -> None:
    content = reply()
    content[wire.ARRAYS] = ArrayRecord({"delta": Array(delta)})
    with pytest.raises(WireError, match=f"^{SOURCE}: {message}"):
        decode(content)


def test_header_that_lies_about_its_array_is_refused() -> None:
    content = reply()
    honest = Array(np.zeros(3, np.float32))
    liar = Array(dtype="float32", shape=(4,), stype=honest.stype, data=honest.data)
    content[wire.ARRAYS] = ArrayRecord({"delta": liar})
    with pytest.raises(WireError, match=r"delta has shape \(3,\); expected \(4,\)"):
        decode(content)


def test_bytes_that_are_no_array_are_refused() -> None:
    content = reply()
    junk = Array(dtype="float32", shape=(4,), stype="numpy.ndarray", data=b"not an array")
    content[wire.ARRAYS] = ArrayRecord({"delta": junk})
    with pytest.raises(WireError, match="delta cannot be read as an array"):
        decode(content)


@pytest.mark.parametrize("record", [wire.ARRAYS, wire.METRICS])
def test_missing_record_is_named(record: str) -> None:
    content = reply()
    del content[record]
    with pytest.raises(WireError, match=f"record '{record}' is missing; got none of its kind"):
        decode(content)


def test_missing_delta_and_key_are_named() -> None:
    content = reply()
    content[wire.ARRAYS] = ArrayRecord({"weights": Array(np.zeros(4, np.float32))})
    with pytest.raises(WireError, match="array 'delta' is missing; got weights"):
        decode(content)
    content = reply()
    content[wire.METRICS] = MetricRecord({"num-examples": 3})
    with pytest.raises(WireError, match="key 'train-loss' is missing; got num-examples"):
        decode(content)


def test_wrong_protocol_version_is_refused() -> None:
    content = wire.encode_registration(wire.Registration("a", 10, 20))
    content[wire.CONFIG] = ConfigRecord({"protocol-version": 99, "client-id": "a"})
    with pytest.raises(WireError, match=r"protocol version 99; expected 1\. Install the same"):
        wire.decode_registration(content, SOURCE)


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(WireError, match="num-correct 11 is more than num-test 10"):
        wire.decode_evaluation(wire.encode_evaluation(wire.Evaluation(10, 11, 0.1)), SOURCE)
    with pytest.raises(WireError, match="num-parameters = 0; expected"):
        wire.decode_registration(wire.encode_registration(wire.Registration("a", 0, 1)), SOURCE)
    with pytest.raises(WireError, match="train-loss is nan; expected a finite number"):
        decode(reply(train_loss=float("nan")))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_halves_the_bytes_and_keeps_relative_error(precision: str) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(5000) * 1e-5).astype(np.float32)
    full = wire.encode_theta(wire.Header("f", 1), x)
    half = wire.encode_theta(wire.Header("f", 1, precision), x)
    assert payload_bytes(half) < 0.52 * payload_bytes(full)
    _, back = wire.decode_theta(half, length=5000, source=SOURCE)
    assert np.linalg.norm(back - x) < 0.004 * np.linalg.norm(x)


def test_bfloat16_rounds_to_nearest_even_like_torch() -> None:
    torch = pytest.importorskip("torch")
    from common.compression import from_bfloat16, to_bfloat16

    x = np.random.default_rng(1).standard_normal(4096).astype(np.float32)
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(x)), expected)


def test_zero_vector_survives_float16() -> None:
    _, back = wire.decode_theta(
        wire.encode_theta(wire.Header("f", 1, "float16"), np.zeros(3, np.float32)),
        length=3,
        source=SOURCE,
    )
    np.testing.assert_array_equal(back, np.zeros(3))
