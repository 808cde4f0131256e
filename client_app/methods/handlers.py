"""What a client answers to each kind of message when the method is a baseline."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import RecordDict

from client_app.methods import TRAINERS
from client_app.methods.base import Trainer
from client_app.participant import Participant
from client_app.training.loop import evaluate
from common import parcels, wire
from common.parcels import Order, Work


def _trainer(participant: Participant) -> Trainer:
    return TRAINERS[participant.config.run.method](participant)


def _open(
    participant: Participant, content: RecordDict, source: str, *, trains: bool = False
) -> tuple[Trainer, Order]:
    order = parcels.decode_order(content, source, trains=trains)
    participant.state.enter_federation(order.header.federation_id)
    return _trainer(participant), order


def _register(participant: Participant, content: RecordDict, source: str) -> RecordDict:
    wire.decode_header(content, source)
    return wire.encode_registration(_trainer(participant).declare())


def _train(participant: Participant, content: RecordDict, source: str) -> RecordDict:
    trainer, order = _open(participant, content, source, trains=True)
    now = order.header.server_round
    evaluation = None
    if order.evaluate:
        evaluation = trainer.measure(order, trainer.ready(order, before=now))
    tool = trainer.ready(order, before=now)
    trained = trainer.fit(order, tool)
    trainer.keep(order, tool, theta=trainer.keeps_theta)
    work = Work(trained.num_examples, trained.loss, trained.seconds, evaluation)
    return parcels.encode_work(work, trainer.collect(order, tool), order.header.precision)


def _evaluate(participant: Participant, content: RecordDict, source: str) -> RecordDict:
    trainer, order = _open(participant, content, source)
    tool = trainer.ready(order, before=order.header.server_round + 1)
    return wire.encode_evaluation(trainer.measure(order, tool))


def _finish(participant: Participant, content: RecordDict, source: str) -> RecordDict:
    trainer, order = _open(participant, content, source)
    tool = trainer.ready(order, before=order.header.server_round + 1)
    trainer.adapt(order, tool)
    place = participant.store(evaluate(tool.model, participant.data))
    return wire.encode_finish_reply(place)


Handler = Callable[[Participant, RecordDict, str], RecordDict]
BASELINE_HANDLERS: dict[str, Handler] = {
    wire.REGISTER: _register,
    wire.TRAIN_PERSONAL: _train,
    wire.EVALUATE_PERSONAL: _evaluate,
    wire.FINISH: _finish,
}
