"""Messages in flight: made when the grid has use for them; replies read or refused in one place."""

from collections.abc import Callable, Iterable, Iterator

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from common.config import RunConfig
from common.messages import DELTA, TRAIN, Pending, Recipient, TrainReply
from common.methods import METHODS, method_class
from common.records import Content, Received, encode
from experiments.run.engines.inprocess import InProcessGrid
from server_app.clients import Client
from server_app.transport import PUSH_BATCH, Arrival, Outgoing, Transport

NUM = 20


def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def messages(transport: Transport, made: list[int]) -> Iterator[Outgoing]:
    for node in range(2, NUM + 2):
        made.append(node)
        yield transport.message(TRAIN, Recipient(str(node), node), Content(), server_round=1)


def grid(workers: int = 1, app: Callable = echo, grid_type: type = InProcessGrid) -> InProcessGrid:
    contexts = {i: Context(1, i, {}, RecordDict(), {}) for i in range(2, NUM + 2)}
    return grid_type(app, contexts, workers)


def test_a_lazy_list_is_made_as_it_is_sent() -> None:
    made: list[int] = []
    transport = Transport(grid(), "mh-pfedhn")
    transport.send(messages(transport, made))
    assert len(made) == PUSH_BATCH
    found, most = [], 0
    while arrivals := transport.poll():
        found += [arrival.pending.node_id for arrival in arrivals]
        most = max(most, len(made) - len(found))
    assert sorted(found) == made == list(range(2, NUM + 2))
    assert most < 2 * PUSH_BATCH


def test_what_was_not_sent_can_be_dropped() -> None:
    made: list[int] = []
    transport = Transport(grid(), "mh-pfedhn")
    transport.send(messages(transport, made))
    transport.drop_unsent()
    answered = sum(len(arrivals) for arrivals in iter(transport.poll, []))
    assert answered == len(made) == PUSH_BATCH


class Malformed(InProcessGrid):
    """Raises over the reply of node 5, as Flower does when it cannot put one together."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            message = self._queue.get(message_id)
            if message is not None and message.metadata.dst_node_id == 5:
                raise AttributeError("'NpzFile' object has no attribute 'shape'")
        return super().pull_messages(message_ids)


def test_a_reply_that_flower_cannot_read_costs_that_reply_alone() -> None:
    transport = Transport(grid(grid_type=Malformed), "mh-pfedhn")
    arrivals = list(transport.exchange(messages(transport, [])))
    assert len(arrivals) == NUM
    (failed,) = [arrival for arrival in arrivals if arrival.content is None]
    assert failed.pending.node_id == 5
    assert failed.failure.startswith("the reply cannot be read: AttributeError: 'NpzFile'")


class Stumbling(InProcessGrid):
    """A SuperLink whose database cannot read what node 5 left in it."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            message = self._queue.get(message_id)
            if message is not None and message.metadata.dst_node_id == 5:
                request = httpx.Request("POST", "https://superlink/v1/runtime/pull-messages")
                response = httpx.Response(500, request=request)
                raise httpx.HTTPStatusError("500", request=request, response=response)
        return super().pull_messages(message_ids)


def test_a_superlink_that_stumbles_over_one_reply_ends_no_run() -> None:
    transport = Transport(grid(grid_type=Stumbling), "mh-pfedhn")
    arrivals = list(transport.exchange(messages(transport, [])))
    assert [a.pending.node_id for a in arrivals if a.content is None] == [5]


class Jammed(InProcessGrid):
    """Cannot take messages to node 5; and is too busy for anything the first time."""

    tries = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        Jammed.tries += 1
        many = list(messages)
        if Jammed.tries == 1 or any(m.metadata.dst_node_id == 5 for m in many):
            request = httpx.Request("POST", "https://superlink/v1/runtime/push-messages")
            response = httpx.Response(500, request=request)
            raise httpx.HTTPStatusError("500", request=request, response=response)
        return super().push_messages(many)


def test_a_message_that_cannot_be_handed_over_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.inflation.PAUSES_S", (0.0, 0.0))
    transport = Transport(grid(grid_type=Jammed), "mh-pfedhn")
    arrivals = list(transport.exchange(messages(transport, [])))
    (failed,) = [a for a in arrivals if a.content is None]
    assert failed.pending.node_id == 5
    assert failed.failure.startswith("it cannot be handed over: HTTPStatusError")
    assert len(arrivals) == NUM


class Lost(InProcessGrid):
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise ConnectionError("the SuperLink is gone")


def test_a_lost_superlink_is_no_bad_reply() -> None:
    transport = Transport(grid(grid_type=Lost), "mh-pfedhn")
    with pytest.raises(ConnectionError):
        list(transport.exchange(messages(transport, [])))


# --- every method refuses the same replies -------------------------------------------------------

CLIENT = Client(
    "a", 6, 10, num_global_parameters=5, group="aa", num_classes=4, feature_dim=3, node_id=2
)
VECTORS = {
    **{key: {} for key in ("local", "local-ensemble")},
    **{key: {"theta": 6} for key in ("fedavg", "fedavg-ft", "fedprox")},
    **{key: {"theta": 5} for key in ("fml", "fedkd")},
    "lg-fedavg": {"head": 16},
    **{key: {"counts": 4, "means": 12} for key in ("fedproto", "fedtgp", "fedgh")},
    "fd": {"counts": 4, "means": 16},
    **{key: {"delta": 6} for key in ("pfedhn", "mh-pfedhn")},
    **{key: {"delta": 6, "global-delta": 5} for key in ("mh-pfedhn-gd", "mh-pfedhn-pg")},
}


class Box:
    """A method with its transport; replies to client a's message as told."""

    def __init__(self, name: str) -> None:
        settings = {"gd-mode": "fused", "chunk-size": 4, "validation-fraction": 0.1}
        config = RunConfig.parse({"method": name, **settings})
        self.method = method_class(name, "server_app")(config)
        self.method.add_client(CLIENT)
        self.method.open_round(1, [CLIENT], lambda *_: [])
        self.transport = Transport(grid(), name)

    def pending(self) -> Pending:
        outgoing = self.transport.message(TRAIN, Recipient("a", 2), Content(), server_round=1)
        return outgoing.pending

    def good(self, pending: Pending) -> RecordDict:
        vectors = {
            name: np.ones(n, np.float32) for name, n in VECTORS[pending.header.method].items()
        }
        return encode(pending.header, Content(TrainReply(4, 0.5, 0.1).settings(), vectors))

    def accepts(self, pending: Pending, content: RecordDict) -> bool:
        def read(reply: Received) -> tuple[object, object]:
            return TrainReply.read(reply, most=CLIENT.num_examples), self.method.read(CLIENT, reply)

        return self.transport.read(Arrival(pending, content), read) is not None


def spoiled(change: Callable[[np.ndarray], object]) -> Callable[[RecordDict], None]:
    """Change the last vector of a reply."""

    def damage(content: RecordDict) -> None:
        name = list(content["arrays"])[-1]
        content["arrays"][name] = Array(change(content["arrays"][name].numpy()))

    return damage


def rename(content: RecordDict) -> None:
    content["arrays"] = ArrayRecord(
        {f"my-{key}": array for key, array in content["arrays"].items()}
    )


def extra(content: RecordDict) -> None:
    content["arrays"]["more"] = Array(np.ones(1000, np.float32))


def header(key: str, value: object) -> Callable[[RecordDict], None]:
    return lambda content: content["config"].update({key: value})


BAD = {
    "old round": header("server-round", 0),
    "other method": header("method", "mlp"),
    "other federation": header("federation-id", "x"),
    "other precision": header("precision", "float16"),
    "other version": header("protocol-version", 1),
    "more examples than registered": header("num-examples", 11),
    "no loss": lambda content: content["config"].pop("train-loss"),
    "extra vector": extra,
    "no arrays": lambda content: content.pop("arrays"),
    "nothing": lambda content: content.clear(),
}
BAD_VECTOR = {
    "renamed": rename,
    "short": spoiled(lambda x: x[:-1]),
    "NaN": spoiled(lambda x: x * np.nan),
    "huge": spoiled(lambda x: x * np.float32(1e30)),
    "float64": spoiled(lambda x: x.astype(np.float64)),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_refuses_what_is_no_good_and_counts_it(name: str) -> None:
    box = Box(name)
    damages = BAD | (BAD_VECTOR if VECTORS[name] else {})
    for number, (kind, damage) in enumerate(damages.items(), 1):
        pending = box.pending()
        content = box.good(pending)
        damage(content)
        assert not box.accepts(pending, content), kind
        assert box.transport.rejected["a"] == number
        assert box.transport.recent[-1].startswith("train.personal reply of client a in round 1: ")
    pending = box.pending()
    assert box.accepts(pending, box.good(pending))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_refuses_a_reply_that_is_repeated(name: str) -> None:
    box = Box(name)
    first, second = box.pending(), box.pending()
    assert box.accepts(first, box.good(first))
    assert not box.accepts(second, box.good(first))
    assert "it answers another message: nonce is" in box.transport.recent[-1]


def test_whatever_reading_raises_is_a_rejection() -> None:
    box = Box("local")

    class Broken(type(box.method)):
        def read(self, client: Client, reply: Received) -> None:
            raise KeyError(DELTA)

    box.method = Broken(box.method.config)
    pending = box.pending()
    assert not box.accepts(pending, box.good(pending))
    assert box.transport.recent[-1].endswith("KeyError: 'delta'")
