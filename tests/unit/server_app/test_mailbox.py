"""Letters are made when the grid has use for them, in blocks that the list alone decides."""

from collections.abc import Iterator

from flwr.app import ConfigRecord, Context, Message, RecordDict

from experiments.run.engines.inprocess import InProcessGrid
from server_app.hypernet import blocks as cutting
from server_app.hypernet.blocks import blocks
from server_app.transport import PUSH_BATCH, Letter, Mailbox, Ticket

NUM = 20


def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def letters(made: list[int]) -> Iterator[Letter]:
    for node in range(2, NUM + 2):
        made.append(node)
        content = RecordDict({"config": ConfigRecord({"node": node})})
        yield Letter(Ticket(str(node), node, "train.personal", 1), content)


def grid(workers: int = 1) -> InProcessGrid:
    contexts = {i: Context(1, i, {}, RecordDict(), {}) for i in range(2, NUM + 2)}
    return InProcessGrid(echo, contexts, workers)  # type: ignore[arg-type]


def test_a_lazy_list_is_made_as_it_is_sent() -> None:
    made: list[int] = []
    mailbox = Mailbox(grid(), 60.0)
    mailbox.send(letters(made))
    assert len(made) == PUSH_BATCH
    found, most = [], 0
    while answers := mailbox.poll():
        found += [answer.ticket.node_id for answer in answers]
        most = max(most, len(made) - len(found))
    assert sorted(found) == made == list(range(2, NUM + 2))
    assert most < 2 * PUSH_BATCH


def test_what_was_not_sent_can_be_dropped() -> None:
    made: list[int] = []
    mailbox = Mailbox(grid(), 60.0)
    mailbox.send(letters(made))
    mailbox.drop_unsent()
    answered = sum(len(answers) for answers in iter(mailbox.poll, []))
    assert answered == len(made) == PUSH_BATCH


def test_a_grid_that_names_no_workers_gets_everything_at_once() -> None:
    made: list[int] = []
    plain = grid()
    del plain.workers
    Mailbox(plain, 60.0).send(letters(made))
    assert len(made) == NUM


def test_blocks_are_of_nearly_equal_size_and_bounded_in_bytes() -> None:
    ids = [str(i) for i in range(130)]
    cut = [list(block) for block in blocks(ids, lambda _: 1000)]
    assert [len(block) for block in cut] == [43, 43, 44]
    assert [client_id for block in cut for client_id in block] == ids
    largest = cutting.BLOCK_BYTES // 4 // 20
    assert {len(block) for block in blocks(ids, lambda _: largest)} == {18, 19}
    assert max(len(block) for block in blocks(ids, lambda _: 2**40)) <= cutting.LEAST_CLIENTS
    assert list(blocks([], lambda _: 1)) == []
