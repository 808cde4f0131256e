"""The in-process engine: the same ServerApp and ClientApp, one process, no Ray.

A Flower `Grid` that calls the ClientApp directly, on worker threads. For tests and for research on
one machine. On CPU its metrics equal the Ray engine's bit for bit for a synchronous schedule.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.config import RunConfig
from common.log import logger

CLIENT_APP_RAISED = 2
"""Flower's error code for an exception inside a ClientApp (flwr ErrorCode)."""

RUN_ID, SERVER_NODE_ID = 1, 1

NodeConfigDict = Mapping[str, bool | int | float | str]


class InProcessGrid(Grid):
    """Delivers messages to a ClientApp in this process.

    One `client_app` serves all nodes; `contexts` are theirs by node_id, kept between messages as
    Flower does. One worker runs clients in the calling thread, one after the other, and then at
    most `batched_clients` waiting ones of one architecture in one batched call
    (`client_app.training.batched`), half as many where the device has no memory for them.
    `num_together` counts the messages that such calls handled; the server sends no more than
    `workers`, the messages that are worked on at a time.
    """

    def __init__(
        self,
        client_app: ClientApp,
        contexts: Mapping[int, Context],
        workers: int = 1,
        *,
        batched_clients: int = 0,
    ) -> None:
        # Flower stamps every message with the process's identity; here the process is the server.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SERVER_NODE_ID
        self._app = client_app
        self._contexts = dict(contexts)
        self._batched_clients = batched_clients
        self.num_together = 0
        self.workers = max(workers, batched_clients)
        self._pool = ThreadPoolExecutor(workers, "client") if workers > 1 else None
        self._queue: dict[str, Message] = {}
        self._futures: dict[str, Future[Message]] = {}
        self._ids = itertools.count(1)
        self._replied = threading.Event()

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes; all are always online."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; with several workers, start on them at once."""
        accepted: list[str] = []
        for message in messages:
            message_id = f"m{next(self._ids)}"
            message.metadata.__dict__["_message_id"] = message_id
            if message.metadata.dst_node_id not in self._contexts:
                continue
            accepted.append(message_id)
            if self._pool is None:
                self._queue[message_id] = message
            else:
                future = self._pool.submit(self._deliver, message)
                future.add_done_callback(lambda _: self._replied.set())
                self._futures[message_id] = future
        return accepted

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there; with one worker, run the next client now."""
        wanted = set(message_ids)
        if self._pool is None:
            if self._batched_clients > 1:
                return self._deliver_together([i for i in self._queue if i in wanted])
            waiting = next((i for i in self._queue if i in wanted), None)
            return [] if waiting is None else [self._deliver(self._queue.pop(waiting))]
        if self._futures.keys() & wanted:
            self._replied.wait(timeout=0.2)
            self._replied.clear()
        done = [i for i in wanted if i in self._futures and self._futures[i].done()]
        return [self._futures.pop(i).result() for i in done]

    def _deliver(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            reply = self._app(message, context)
        except Exception as error:  # the app's edge: Flower turns any exception into a reply
            reason = f"{type(error).__name__}: {error}"
            reply = Message(Error(CLIENT_APP_RAISED, reason), reply_to=message)
        return reply

    def _deliver_together(self, message_ids: Sequence[str]) -> list[Message]:
        """Deliver the next waiting messages, in one batched call where they allow it."""
        from experiments.run.engines.together import reply_together

        taken = {i: self._queue.pop(i) for i in message_ids[: self._batched_clients]}
        messages = list(taken.values())
        pairs = [(m, self._contexts[m.metadata.dst_node_id]) for m in messages]
        try:
            replies = reply_together(pairs)
        except torch.OutOfMemoryError:
            self._batched_clients = len(pairs) // 2
            logger.warning(
                "The device has no memory for %d clients in one batched call: from now on %d.",
                len(pairs),
                max(1, self._batched_clients),
            )
            self._queue = taken | self._queue
            return []
        except Exception as error:  # the app's edge, as below; one by one shows whose fault it is
            logger.warning("Batched training failed, going on one by one: %s", error)
            replies = [None] * len(pairs)
        self.num_together += sum(content is not None for content in replies)
        return [
            self._deliver(message) if content is None else Message(content, reply_to=message)
            for message, content in zip(messages, replies, strict=True)
        ]

    def close(self) -> None:
        """Stop the workers; what they still do is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    # The rest of Flower's interface, which nothing here uses.

    def set_run(self, run: Run) -> None:
        """Accept any run: there is only one."""

    @property
    def run(self) -> Run:
        """There is no Flower run."""
        raise NotImplementedError

    def create_message(self, *arguments: Any, **options: Any) -> Message:
        """Make messages by `Message(...)`."""
        raise NotImplementedError

    def send_and_receive(self, *arguments: Any, **options: Any) -> Iterable[Message]:
        """Push and pull instead."""
        raise NotImplementedError


def simulated_nodes(num_clients: int) -> list[dict[str, Any]]:
    """Return the node configs that Flower's simulation gives its nodes."""
    return [{"partition-id": i, "num-partitions": num_clients} for i in range(num_clients)]


def make_contexts(config: RunConfig, node_configs: Sequence[NodeConfigDict]) -> dict[int, Context]:
    """Make one Flower context for each node; node ids follow the server's."""
    return {
        node_id: Context(
            run_id=RUN_ID,
            node_id=node_id,
            node_config=dict(node_config),
            state=RecordDict(),
            run_config=dict(config.flat()),
        )
        for node_id, node_config in enumerate(node_configs, start=SERVER_NODE_ID + 1)
    }


def run_inprocess(
    config: RunConfig,
    node_configs: Sequence[NodeConfigDict],
    *,
    workers: int = 0,
    batched_clients: int = 0,
    client_app: ClientApp | None = None,
    grid_type: type[InProcessGrid] = InProcessGrid,
) -> InProcessGrid:
    """Run a whole federation in this process; raises what the ServerApp raises.

    Returns its grid. The nodes run `client_app`, by default the real one, on so many threads as
    `workers` says; 0 means one per CPU core, and one where the schedule has a single client in
    flight (torch then may use its threads inside the client), or where clients are batched.
    """
    from client_app.app import app
    from server_app.app import app as server_app

    if batched_clients > 1:
        workers = 1
    if workers == 0:
        workers = 1 if config.schedule.max_in_flight == 1 else (os.cpu_count() or 1)
    contexts = make_contexts(config, node_configs)
    grid = grid_type(client_app or app, contexts, workers, batched_clients=batched_clients)
    threads = torch.get_num_threads()
    if workers > 1 and config.client.client_threads:
        # One setting for all threads: a client that set and restored it would race with the others
        torch.set_num_threads(config.client.client_threads)
    server_context = Context(RUN_ID, SERVER_NODE_ID, {}, RecordDict(), dict(config.flat()))
    try:
        server_app(grid, server_context)
    finally:
        grid.close()
        torch.set_num_threads(threads)
    return grid
