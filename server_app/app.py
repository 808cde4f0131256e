"""The Flower ServerApp: config -> method -> rounds -> results, and what a checkpoint holds."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.exit import add_exit_handler

from common.config import RunConfig
from common.errors import CheckpointError, ConfigError, RunError
from common.inflation import bound_replies
from common.log import logger
from common.messages import FINISH, PAUSED, Recipient
from common.methods import METHODS, method_class
from common.records import Content
from server_app.clients import Registry
from server_app.methods.base import Method
from server_app.output.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from server_app.output.run_folder import RunFolder, run_folder_path
from server_app.strategy import Rounds
from server_app.transport import Transport

app = ServerApp()

CHECKPOINTS = "checkpoint"
"""Name of the folder with checkpoints in a run's folder."""
PAUSE_S = 4.0
"""For which a run that stops waits for participants to take notice: a SuperNode asks every 3 s."""
STOPS = (signal.SIGINT, signal.SIGTERM)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the method of the run config to its end; the folder of results is logged first and last.

    Raises
    ------
    MHpFedHNError
        The config cannot be used, or too few clients are left. What was learned is on disk.
    """
    config = RunConfig.parse(context.run_config)
    kind = method_class(config.run.method, "server_app")
    config = kind.adapted(config)
    method = kind(config)
    transport = Transport(
        grid,
        config.run.method,
        precision=config.wire.wire_precision,
        timeout_s=config.schedule.message_timeout_s,
    )
    bound_replies(transport.most_bytes)
    with _disk_errors_told():
        folder = RunFolder(run_folder_path(config), config)
    logger.info("Results go to %s", folder.path)
    registry = Registry(config.hypernet.max_parameters, method.admit)
    server = Server(method, transport, registry, folder)
    running = [server]
    add_exit_handler(partial(_say_paused, running), run_before_force_exit=True)
    try:
        with _disk_errors_told():
            last = server.begin()
        Rounds(method, transport, registry, folder, server.save).run(last + 1)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        level = logging.WARNING if stopped else logging.ERROR
        reason = f"{type(error).__name__}: {error}"
        logger.log(level, "Run stopped: %s", reason)
        folder.close("interrupted" if stopped else "failed", reason)
        if not stopped:
            server.say_paused()
        raise
    finally:
        running.clear()
    folder.close("completed")


def _say_paused(running: list[Server]) -> None:
    """Tell participants that a signal ends this process, before Flower gives up the run.

    Flower calls it once, in the main thread. Signals that come meanwhile would keep it from saying
    how the run ended: the SuperExec that goes before us makes one.
    """
    if not running:
        return
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
    try:
        running[0].say_paused()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextmanager
def _disk_errors_told() -> Iterator[None]:
    """Say what to do where the run's folder cannot be written before the first round."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"the run's folder cannot be used: {error}. Nothing was trained yet: free some space, "
            "or set output-dir to a folder that the server may write to."
        ) from error


@dataclass(frozen=True)
class Server:
    """What a checkpoint holds: what the method learned, who is who, the rows so far."""

    method: Method[Any]
    transport: Transport
    registry: Registry
    folder: RunFolder

    def save(self) -> None:
        """Write a checkpoint; a disk that is full costs the checkpoint, not the run."""
        run = self.method.config.run
        tensors, learned = self.method.state_dict()
        meta = {
            "federation-id": self.transport.federation_id,
            "method": run.method,
            "seed": run.seed,
            "user-privacy": _user_privacy(self.method.config),
            "server-rule": self.method.config.update.server_rule,
            "measure-alone": self.method.config.client.measure_alone,
            "num-steps": self.method.num_steps,
            "registry": self.registry.export(),
            "rejected": dict(self.transport.rejected),
            "rows": [dict(row) for row in self.folder.rows],
            "clients": [dict(row) for row in self.folder.client_rows],
            "learned": learned,
        }
        folder = self.folder.path / CHECKPOINTS
        try:
            path = save_checkpoint(folder, tensors=tensors, meta=meta, keep=run.keep_checkpoints)
        except CheckpointError as error:
            logger.error("No checkpoint this time, the run goes on: %s", error)
            return
        logger.info("Checkpoint: %s", path)

    def say_paused(self) -> None:
        """Tell those who are here that the run has stopped and may go on, within `PAUSE_S`.

        A connection that hangs, or a lock of the thread that was interrupted, costs no more: it is
        waited for in a thread of its own.
        """
        clients = [c for c in self.registry.clients().values() if self.registry.is_here(c)]
        if not self.folder.rows or not clients:
            return
        method, last = self.method.config.run.method, int(self.folder.rows[-1]["round"])
        afresh = Transport(self.transport.grid, method, timeout_s=PAUSE_S)
        afresh.federation_id = self.transport.federation_id
        bound_replies(afresh.most_bytes)

        def tell() -> None:
            notices = (
                afresh.message(
                    FINISH,
                    Recipient(client.client_id, client.node_id),
                    Content({PAUSED: True}),
                    server_round=last,
                )
                for client in clients
            )
            with suppress(Exception):  # whoever is not told sees that nothing comes
                heard = afresh.exchange(notices, window=len(clients))
                count = sum(arrival.content is not None for arrival in heard)
                logger.info("%d of %d clients know that the run pauses", count, len(clients))

        thread = Thread(target=tell, daemon=True)
        thread.start()
        thread.join(PAUSE_S)

    def begin(self) -> int:
        """Begin the run's folder, from `resume-from` where it is set; return the last round."""
        run = self.method.config.run
        if not run.resume_from:
            if run.novel_only:
                raise ConfigError(
                    "novel-only = true, but there is nothing to freeze. Set resume-from to the run "
                    "whose trunk and heads the new clients shall use."
                )
            self.folder.begin()
            self.method.keep_releases(self.folder.path)
            return 0
        source = Path(run.resume_from).expanduser()
        nested = source / CHECKPOINTS
        checkpoint = load_checkpoint(nested if nested.is_dir() else source)
        try:
            _require_same_run(checkpoint, self.method.config)
            last = self._restore(checkpoint)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(
                f"checkpoint {checkpoint.path} is whole, but does not hold what is read: "
                f"{type(error).__name__}: {error}. Resume from a checkpoint that a run of this "
                "version wrote."
            ) from error
        earlier = source if nested.is_dir() else checkpoint.path.parent.parent
        self.method.keep_releases(self.folder.path, earlier)
        logger.info("Resumed after round %d from %s", last, checkpoint.path)
        if last >= run.rounds:
            self._nothing_left(last)
        return last

    def _restore(self, checkpoint: Checkpoint) -> int:
        """Take over everything that a checkpoint holds; return its round."""
        meta = checkpoint.meta
        self.transport.federation_id = str(meta["federation-id"])
        self.transport.rejected.update(meta["rejected"])
        self.registry.restore(meta["registry"])
        self.method.num_steps = int(meta["num-steps"])
        self.method.load_state_dict(checkpoint.tensors, meta["learned"])
        last = int(meta["rows"][-1]["round"])
        self.folder.begin(meta["rows"], meta["clients"])
        return last

    def _nothing_left(self, last: int) -> None:
        """Say that a resumed run is over; its models may still have to be handed out."""
        run = self.method.config.run
        message = (
            f"The checkpoint is of round {last} and rounds = {run.rounds}: no round is left. "
            f"rounds counts from the very beginning; set it above {last}."
        )
        if run.novel_only:
            raise ConfigError(message)
        logger.warning("%s Final models are handed out, nothing else.", message)


def _user_privacy(config: RunConfig) -> list[float]:
    """Return noise and clip of user-level privacy, zeros without."""
    update = config.update
    return [update.user_dp_noise, update.user_dp_clip] if update.user_dp_noise else [0.0, 0.0]


def _require_same_run(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Raise CheckpointError where a run cannot go on with what another method or start learned.

    Under the kernel rule the start of every model is drawn from the seed; clients would add another
    start to what was learned for theirs.
    """
    meta, run = checkpoint.meta, config.run
    if meta["method"] != run.method:
        raise CheckpointError(
            f"{checkpoint.path} was written by method {meta['method']}; this run is "
            f"{run.method}. Set method to the checkpoint's to resume."
        )
    private, now = meta["user-privacy"], _user_privacy(config)
    if private != now:
        raise CheckpointError(
            f"{checkpoint.path} was learned with user-dp-noise = {private[0]:g} and user-dp-clip = "
            f"{private[1]:g}; this run has {now[0]:g} and {now[1]:g}. What a run released before "
            "cannot be made private, or more so, afterwards. Set both as they were to resume."
        )
    rule, seed, wanted = meta["server-rule"], int(meta["seed"]), config.update.server_rule
    has_rule = not METHODS[run.method].is_baseline
    if has_rule and rule != wanted:
        raise CheckpointError(
            f"{checkpoint.path} was learned with server-rule = {rule!r}; this run has {wanted!r}, "
            f"whose hypernetwork is another one. Set server-rule to {rule!r} to resume."
        )
    if has_rule and config.adds_init and seed != run.seed:
        raise CheckpointError(
            f"{checkpoint.path} was learned with seed {seed}: the start that generated values are "
            f"added to comes from the seed. Set seed to {seed} to resume; it is {run.seed}."
        )
    if METHODS[run.method].is_baseline and not config.client.state_dir:
        logger.warning(
            "What %s keeps on clients (own models, BatchNorm statistics) is lost where they "
            "have no state-dir: such a client starts anew. Set state-dir to resume exactly.",
            run.method,
        )
    kept_alone = config.client.state_dir and meta.get("measure-alone")
    if config.client.measure_alone and not kept_alone:
        logger.warning(
            "Models trained alone start anew where clients kept none (no state-dir, or "
            "measure-alone was false before): they have fewer rounds than the federation, and the "
            "gain over them is too large. Start a new run to measure it."
        )
    if seed != run.seed:
        logger.warning(
            "The checkpoint's run had seed %s; this one goes on with %d, so it differs from a run "
            "that was never interrupted.",
            seed,
            run.seed,
        )
