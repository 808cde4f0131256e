"""The one form of all messages: what survives the wire, and what is refused with which words."""

import io
import zipfile
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.class_means import ClassMeans
from common.config import DistillSection, TrainingSection
from common.errors import WireError
from common.messages import DELTA, Evaluation, Registration, TrainReply
from common.records import ARRAYS, CONFIG, Content, Header, Received, encode, payload_bytes

HEADER = Header("fed", "mh-pfedhn", 3, "a1b2")


def with_array(raw: np.ndarray | Array) -> RecordDict:
    """A reply whose delta is this array."""
    content = encode(HEADER, Content(TrainReply(5, 0.5, 0.1).settings()))
    array = raw if isinstance(raw, Array) else Array(raw)
    content[ARRAYS] = ArrayRecord({DELTA: array})
    return content


def made_of(data: bytes) -> Array:
    return Array(dtype="float32", shape=(4,), stype="numpy.ndarray", data=data)


def npy(x: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, x)
    return stream.getvalue()


def archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("delta.npy", npy(np.zeros(4, np.float32)))
    return stream.getvalue()


def claiming(shape: str) -> bytes:
    """A .npy file whose header claims another shape than (4,)."""
    return npy(np.zeros(4, np.float32)).replace(b"(4,), ", f"{shape}, ".encode())


def test_a_message_survives_the_wire() -> None:
    settings = TrainingSection(batch_size=8).flat() | DistillSection(distill_alpha=0.01).flat()
    x = np.array([1.0, -2.0], dtype=np.float32)
    back = Received(encode(HEADER, Content({**settings, "evaluate": True}, {"theta": x})))
    assert back.header == HEADER
    assert back.section(TrainingSection) == TrainingSection(batch_size=8)
    assert back.section(DistillSection).distill_alpha == 0.01
    assert back.flag("evaluate")
    assert not back.flag("distil")
    assert "theta" in back
    assert "delta" not in back
    found = back.vector("theta", 2)
    np.testing.assert_array_equal(found, x)
    assert found.flags.writeable


def test_what_a_client_measured_survives_the_wire() -> None:
    sent = TrainReply(5, 0.25, 1.0, Evaluation(10, 7, 0.5, 0.1, {"head": 3}))
    content = encode(HEADER, Content(sent.settings()))
    assert TrainReply.read(Received(content), most=5, others=["head"]) == sent
    assert payload_bytes(content) == 0
    registration = Registration("site-1", 172, 60, group="ab12", num_classes=4)
    read = Registration.read(Received(encode(HEADER, Content(registration.settings()))))
    assert read == registration


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (np.zeros(3, np.float32), "delta has shape (3,); expected (4,), one entry for each tr"),
        (np.zeros((2, 2), np.float32), "delta has shape (2, 2); expected (4,)"),
        (np.float32([0, np.nan, 0, 0]), "delta has 1 of 4 entries that are NaN or infinite"),
        (np.float32([0, np.inf, 0, 0]), "delta has 1 of 4 entries that are NaN or infinite"),
        (np.zeros(4, np.float64), "delta has dtype float64; expected float32, float16, uint16"),
        (np.zeros(4, ">f4"), "delta has dtype >f4; expected float32"),
        (made_of(b"not an array"), "delta cannot be read as an array"),
        (made_of(b""), "delta cannot be read as an array"),
        (made_of(archive()), "delta cannot be read as an array: the magic string"),
        (made_of(npy(np.zeros(4, np.float32))[:-4]), "delta cannot be read as an array: cannot re"),
        (made_of(npy(np.zeros(4, np.float32))[:-1]), "delta cannot be read as an array: buffer s"),
        (made_of(npy(np.zeros(3, np.float32))), "delta has shape (3,); expected (4,)"),
        (made_of(claiming("(9,)")), "delta cannot be read as an array: cannot reshape"),
        (made_of(claiming("('x',)")), "delta cannot be read as an array"),
        (made_of(npy(np.zeros(4, object))), "delta cannot be read as an array"),
    ],
)
def test_bad_vector_is_refused(raw: np.ndarray | Array, message: str) -> None:
    with pytest.raises(WireError) as caught:
        Received(with_array(raw)).vector(DELTA, 4)
    assert str(caught.value).startswith(message)


def removed(record: str) -> Callable[[RecordDict], None]:
    return lambda content: content.pop(record)


def changed(key: str, value: object) -> Callable[[RecordDict], None]:
    return lambda content: content[CONFIG].update({key: value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (removed(ARRAYS), "record 'arrays' is missing; got config."),
        (removed(CONFIG), "record 'config' is missing; got arrays."),
        (lambda c: c.clear(), "record 'config' is missing; got none."),
        (lambda c: c.update(arrays=ConfigRecord()), "record 'arrays' is missing; got config, arr"),
        (lambda c: c.update(more=MetricRecord()), "there are other records than config and arrays"),
        (changed("protocol-version", 99), "protocol version 99; expected 3. Install the same"),
        (changed("protocol-version", "2"), "protocol-version = '2'; expected int."),
        (changed("nonce", 7), "nonce = 7; expected str."),
        (changed("precision", "float8"), "unknown precision 'float8'. Did you mean"),
        (lambda c: c[CONFIG].pop("nonce"), "key 'nonce' is missing; got protocol-version"),
    ],
)
def test_bad_form_is_refused(damage: Callable, message: str) -> None:
    content = with_array(np.zeros(4, np.float32))
    damage(content)
    with pytest.raises(WireError) as caught:
        Received(content)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ({"nonce": "old"}, "nonce"),
        ({"server_round": 2}, "server-round"),
        ({"method": "fedavg"}, "method"),
        ({"federation_id": "x"}, "federation-id"),
        ({"precision": "float16"}, "precision"),
    ],
)
def test_a_reply_repeats_the_header_of_its_message(other: dict, word: str) -> None:
    HEADER.require_repeated(HEADER)
    with pytest.raises(WireError, match=f"it answers another message: {word} is"):
        HEADER.require_repeated(replace(HEADER, **other))


def test_vectors_that_nobody_asked_for_are_refused() -> None:
    received = Received(with_array(np.zeros(4, np.float32)))
    with pytest.raises(WireError, match="nobody asked for array delta"):
        received.require_all_read()
    received.vector(DELTA, 4)
    received.require_all_read()


@pytest.mark.parametrize(
    ("settings", "read", "message"),
    [
        (Evaluation(10, 11, 0.1).settings(), Evaluation.read, "num-correct = 11; expected 0 to 10"),
        (
            Evaluation(10, 7, 0.5, 0.1, {"head": 11}).settings(),
            lambda r: Evaluation.read(r, ["head"]),
            "num-correct-head = 11; expected 0 to 10",
        ),
        (
            TrainReply(6, 0.1, 0.1).settings(),
            lambda r: TrainReply.read(r, most=5),
            "num-examples = 6; expected 1 to 5",
        ),
        (
            TrainReply(5, float("nan"), 0.1).settings(),
            lambda r: TrainReply.read(r, most=5),
            "train-loss is nan; expected a number from",
        ),
        (
            TrainReply(5, 1.5e308, 0.1).settings(),
            lambda r: TrainReply.read(r, most=5),
            "train-loss is 1.5e+308; expected a number from 0 to 1e+06",
        ),
        (
            TrainReply(5, 0.1, -1.0).settings(),
            lambda r: TrainReply.read(r, most=5),
            "seconds is -1.0; expected a number from 0",
        ),
        (
            Registration("a", 0, 1).settings(),
            Registration.read,
            "key 'num-parameters' is missing",
        ),
        (Registration("a", -1, 1).settings(), Registration.read, "num-parameters = -1; expected 1"),
        (Registration("a" * 201, 1, 1).settings(), Registration.read, "client-id 'aaaa"),
        (Registration("a", 1, 1, group="xyz").settings(), Registration.read, "group = 'xyz'; expe"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, read: Callable, message: str) -> None:
    with pytest.raises(WireError) as caught:
        read(Received(encode(HEADER, Content(settings))))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_precision_halves_the_bytes_of_vectors_but_leaves_counts_exact(precision: str) -> None:
    x = (np.random.default_rng(0).standard_normal(5000) * 1e-5).astype(np.float32)
    header = replace(HEADER, precision=precision)
    content = encode(header, Content(arrays={"theta": x}))
    ratio = payload_bytes(content) / payload_bytes(encode(HEADER, Content(arrays={"theta": x})))
    assert ratio < (1.01 if precision == "float32" else 0.52)
    back = Received(content).vector("theta", 5000)
    assert np.linalg.norm(back - x) < 0.004 * np.linalg.norm(x)
    means = ClassMeans(np.array([1001, 0, 4097]), np.float32([[1, 2], [0, 0], [3, 4]]))
    received = Received(encode(header, Content(arrays=means.arrays())))
    assert ClassMeans.read(received, 3, 2).counts.tolist() == [1001, 0, 4097]
