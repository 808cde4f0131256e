"""The only record keys, and what may stand behind them.

Both apps build and read Flower records here and nowhere else. Every decode checks version, dtype,
shape and finiteness of the real array (never the header's claim) and raises a `WireError` that
says what was expected, what came, from whom, and what to change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.compression import Float32, Precision
from common.config import DistillSection, TrainingSection
from common.errors import WireError, unknown_name
from common.records import (
    ARRAYS,
    CONFIG,
    METRICS,
    arrays_of,
    config_of,
    count_of,
    decode_vector,
    encode_vector,
    metrics_of,
    number_of,
    optional_vector,
    section_of,
    value_of,
)
from common.sparse import decode_delta, encode_delta

PROTOCOL_VERSION = 1

REGISTER = "query.register"
TRAIN_PERSONAL = "train.personal"
TRAIN_GLOBAL = "train.global"
EVALUATE_PERSONAL = "evaluate.personal"
FINISH = "query.finish"

THETA, GLOBAL_THETA, DELTA, GLOBAL_DELTA = "theta", "global-theta", "delta", "global-delta"


@dataclass(frozen=True)
class Header:
    """What every message of the server carries."""

    federation_id: str
    server_round: int
    precision: Precision = "float32"


@dataclass(frozen=True)
class Registration:
    """`query.register` reply: who a client is and how large. Nothing else about its model.

    `num_global_parameters` is the size of the shared global model of MH-pFedHNGD as this client
    builds it (0 without GD); all clients must agree on it. The last three are sent for baselines
    that cannot do without them, and are empty otherwise: `group` is an opaque tag, equal in
    one architecture, or declared (also for head-sharing = "tag"); the head maps features
    (feature_dim,) to logits (num_classes,).
    """

    client_id: str
    num_parameters: int
    num_examples: int
    num_global_parameters: int = 0
    group: str = ""
    num_classes: int = 0
    feature_dim: int = 0


@dataclass(frozen=True)
class TrainTask:
    """`train.personal` / `train.global`: what one client has to do in one round.

    theta (K_i,) is absent in `train.global`. global_theta (K_g,) is the global model w_g: to be
    trained when `train_global`, and the teacher of the distillation when `distill` is set. When it
    is absent while `distill` is set, the client uses the w_g it received earlier in the round.
    """

    header: Header
    training: TrainingSection
    theta: Float32 | None = None
    global_theta: Float32 | None = None
    train_global: bool = False
    distill: DistillSection | None = None
    evaluate: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Test counts of one client: weights exactly as received, its own BatchNorm statistics.

    `others` are the counts of correct examples of further predictors that a baseline reports
    beside its own, by name (FedProto: its head).
    """

    num_test: int
    num_correct: int
    test_loss: float
    seconds: float = 0.0
    others: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainReply:
    """Reply to a `TrainTask`: delta (K_i,) and/or global_delta (K_g,), with counts and losses.

    `server_round` is the round of the task that was trained: the server refuses a delta that
    belongs to another.
    """

    num_examples: int
    train_loss: float
    seconds: float
    server_round: int = 0
    delta: Float32 | None = None
    global_delta: Float32 | None = None
    evaluation: Evaluation | None = None


# --- server to client ----------------------------------------------------------------------------


def header_config(header: Header) -> dict[str, Any]:
    """Return the config keys that stand for a header."""
    return {
        "protocol-version": PROTOCOL_VERSION,
        "federation-id": header.federation_id,
        "server-round": header.server_round,
        "precision": header.precision,
    }


def decode_header(content: RecordDict, source: str) -> Header:
    """Read and check the header of a server's message; a wrong protocol version is refused."""
    config = config_of(content, source)
    check_version(config, source)
    return Header(
        federation_id=value_of(config, "federation-id", str, source),
        server_round=value_of(config, "server-round", int, source),
        precision=_precision(value_of(config, "precision", str, source), source),
    )


def _precision(name: str, source: str) -> Precision:
    if name not in get_args(Precision):
        raise WireError(f"{source}: " + unknown_name("precision", name, get_args(Precision)))
    return cast(Precision, name)


def check_version(config: Mapping[str, Any], source: str) -> None:
    """Raise WireError when the peer speaks another version of this protocol."""
    version = value_of(config, "protocol-version", int, source)
    if version != PROTOCOL_VERSION:
        raise WireError(
            f"{source}: protocol version {version}; expected {PROTOCOL_VERSION}. "
            "Install the same mh-pfedhn release on the server and on every client."
        )


def encode_query(header: Header) -> RecordDict:
    """Encode `query.register`."""
    return RecordDict({CONFIG: ConfigRecord(header_config(header))})


def encode_theta(header: Header, theta: Float32) -> RecordDict:
    """Encode `evaluate.personal` and `query.finish`: theta (K_i,) and the header."""
    content = encode_query(header)
    content[ARRAYS] = ArrayRecord(encode_vector(THETA, theta, header.precision))
    return content


def decode_theta(content: RecordDict, *, length: int, source: str) -> tuple[Header, Float32]:
    """Decode `evaluate.personal` and `query.finish`."""
    header = decode_header(content, source)
    return header, decode_vector(arrays_of(content, source), THETA, length=length, source=source)


def encode_train_task(task: TrainTask) -> RecordDict:
    """Encode `train.personal` or `train.global`."""
    config = header_config(task.header) | task.training.flat()
    config |= {"evaluate": task.evaluate, "train-global": task.train_global}
    config["distil"] = task.distill is not None
    if task.distill is not None:
        config |= task.distill.flat()
    arrays: dict[str, Array] = {}
    if task.theta is not None:
        arrays |= encode_vector(THETA, task.theta, task.header.precision)
    if task.global_theta is not None:
        arrays |= encode_vector(GLOBAL_THETA, task.global_theta, task.header.precision)
    return RecordDict({CONFIG: ConfigRecord(config), ARRAYS: ArrayRecord(arrays)})


def decode_train_task(content: RecordDict, source: str) -> TrainTask:
    """Decode `train.personal` or `train.global`; lengths are checked where the model is known."""
    header = decode_header(content, source)
    config, arrays = config_of(content, source), arrays_of(content, source)
    return TrainTask(
        header=header,
        training=section_of(TrainingSection, config, source),
        theta=optional_vector(arrays, THETA, None, source),
        global_theta=optional_vector(arrays, GLOBAL_THETA, None, source),
        train_global=value_of(config, "train-global", bool, source),
        distill=section_of(DistillSection, config, source)
        if value_of(config, "distil", bool, source)
        else None,
        evaluate=value_of(config, "evaluate", bool, source),
    )


# --- client to server ----------------------------------------------------------------------------


def encode_registration(registration: Registration) -> RecordDict:
    """Encode the reply to `query.register`; what a method has no use for is not sent."""
    config: dict[str, Any] = {
        "protocol-version": PROTOCOL_VERSION,
        "client-id": registration.client_id,
    }
    counts = {
        "num-parameters": registration.num_parameters,
        "num-examples": registration.num_examples,
        "num-global-parameters": registration.num_global_parameters,
    }
    extra = {"num-classes": registration.num_classes, "feature-dim": registration.feature_dim}
    counts |= {key: value for key, value in extra.items() if value}
    if registration.group:
        config["group"] = registration.group
    return RecordDict({CONFIG: ConfigRecord(config), METRICS: MetricRecord(dict(counts))})


def decode_registration(content: RecordDict, source: str) -> Registration:
    """Decode and check the reply to `query.register`."""
    config, metrics = config_of(content, source), metrics_of(content, source)
    check_version(config, source)
    client_id = value_of(config, "client-id", str, source)
    if not client_id or len(client_id) > 200:
        raise WireError(f"{source}: client-id must have 1 to 200 characters, got {client_id!r}.")
    return Registration(
        client_id=client_id,
        num_parameters=count_of(metrics, "num-parameters", 1, source),
        num_examples=count_of(metrics, "num-examples", 1, source),
        num_global_parameters=count_of(metrics, "num-global-parameters", 0, source),
        group=_group(config, source),
        num_classes=count_of(metrics, "num-classes", 1, source) if "num-classes" in metrics else 0,
        feature_dim=count_of(metrics, "feature-dim", 1, source) if "feature-dim" in metrics else 0,
    )


def _group(config: Mapping[str, Any], source: str) -> str:
    group = value_of(config, "group", str, source) if "group" in config else ""
    if len(group) > 64 or not all(c in "0123456789abcdef" for c in group):
        raise WireError(f"{source}: group = {group[:80]!r}; expected up to 64 hex digits.")
    return group


def encode_train_reply(
    reply: TrainReply, precision: Precision, *, top_k: float = 1.0
) -> RecordDict:
    """Encode the reply to `train.personal` or `train.global`; `top_k` is the run's uplink-top-k."""
    metrics: dict[str, int | float] = {
        "num-examples": reply.num_examples,
        "train-loss": reply.train_loss,
        "seconds": reply.seconds,
        "server-round": reply.server_round,
    }
    if reply.evaluation is not None:
        metrics |= evaluation_metrics(reply.evaluation)
    arrays: dict[str, Array] = {}
    for name, vector in ((DELTA, reply.delta), (GLOBAL_DELTA, reply.global_delta)):
        if vector is not None:
            arrays |= encode_delta(name, vector, precision, top_k=top_k)
    return RecordDict({METRICS: MetricRecord(dict(metrics)), ARRAYS: ArrayRecord(arrays)})


def decode_train_reply(
    content: RecordDict,
    *,
    num_parameters: int,
    num_global_parameters: int,
    source: str,
    top_k: float = 1.0,
) -> TrainReply:
    """Decode a training reply; a length of 0 means that the vector was not asked for."""
    arrays, metrics = arrays_of(content, source), metrics_of(content, source)
    lengths = {DELTA: num_parameters, GLOBAL_DELTA: num_global_parameters}
    deltas = {
        name: decode_delta(arrays, name, length=length, top_k=top_k, source=source)
        for name, length in lengths.items()
        if length
    }
    return TrainReply(
        num_examples=count_of(metrics, "num-examples", 1, source),
        train_loss=number_of(metrics, "train-loss", source),
        seconds=number_of(metrics, "seconds", source),
        server_round=count_of(metrics, "server-round", 0, source),
        delta=deltas.get(DELTA),
        global_delta=deltas.get(GLOBAL_DELTA),
        evaluation=decode_evaluation(content, source) if "num-test" in metrics else None,
    )


def evaluation_metrics(evaluation: Evaluation) -> dict[str, int | float]:
    """Return the metrics that stand for an evaluation in a reply."""
    others = {f"num-correct-{name}": count for name, count in evaluation.others.items()}
    return others | {
        "num-test": evaluation.num_test,
        "num-correct": evaluation.num_correct,
        "test-loss": evaluation.test_loss,
        "seconds-evaluation": evaluation.seconds,
    }


def encode_evaluation(evaluation: Evaluation) -> RecordDict:
    """Encode the reply to `evaluate.personal`."""
    return RecordDict({METRICS: MetricRecord(dict(evaluation_metrics(evaluation)))})


def decode_evaluation(content: RecordDict, source: str, others: Iterable[str] = ()) -> Evaluation:
    """Decode and check test counts: 0 <= num_correct <= num_test, also of the other predictors."""
    metrics = metrics_of(content, source)
    num_test = count_of(metrics, "num-test", 1, source)
    names = ["num-correct", *(f"num-correct-{name}" for name in others)]
    correct = [count_of(metrics, name, 0, source) for name in names]
    for name, count in zip(names, correct, strict=True):
        if count > num_test:
            raise WireError(f"{source}: {name} {count} is more than num-test {num_test}.")
    return Evaluation(
        num_test=num_test,
        num_correct=correct[0],
        test_loss=number_of(metrics, "test-loss", source),
        seconds=number_of(metrics, "seconds-evaluation", source),
        others=dict(zip(others, correct[1:], strict=True)),
    )


def encode_finish_reply(location: str) -> RecordDict:
    """Encode the reply to `query.finish`: where the personal model was stored."""
    return RecordDict({CONFIG: ConfigRecord({"location": location})})


def decode_finish_reply(content: RecordDict, source: str) -> str:
    """Decode the reply to `query.finish`."""
    return value_of(config_of(content, source), "location", str, source)
