"""One run from start to end: folder, data, engine, progress, final status, table and pictures."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from common.config import RunConfig
from common.errors import ConfigError, MHpFedHNError, RunError
from common.files import read_json
from experiments.console import say
from experiments.report.clients import draw_clients
from experiments.report.runs import Run, new_folder, settle
from experiments.report.terminal import family_table, run_table
from experiments.report.track import require, tracked
from experiments.run.engines.home import own_modules
from experiments.run.engines.superlink import RayEngine
from experiments.run.interrupts import terminate_as_interrupt
from experiments.run.presets import EngineSection, Preset
from experiments.run.progress import follow
from server_app.output.curves import draw_curves

FAILED, INTERRUPTED = 1, 130
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""Keeps the Hugging Face libraries from asking the hub: the user gave the data."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_TELLING = re.compile(r"^(\S+ \S+ )?(WARNING|ERROR)\b|^[\w.]+(Error|Exception)\b")
_NOISE = re.compile(
    r"Since flwr|Exit Code|raised an exception|Manually terminating|Traceback|Run stopped"
    r"|ray::ClientAppActor|by RayBackend|ClientAppException"
)


def complete(preset: Preset) -> Preset:
    """Fill in what only a launch knows: the run's own absolute folder, its name, its clients.

    Raises ConfigError where the output folder already holds a run, or Ray is to leave clients out.
    """
    run, schedule = preset.config.run, preset.config.schedule
    if preset.config.client.absent_clients and preset.engine.name != "inprocess":
        raise ConfigError(
            f"absent-clients = {preset.config.client.absent_clients} needs engine 'inprocess': "
            "Flower's simulation starts every node."
        )
    folder = Path(run.output_dir) if run.output_dir else new_folder(preset.name)
    if (folder / "metrics.jsonl").exists() and not run.resume_from:
        raise ConfigError(
            f"{folder} already holds a run. Choose another --output-dir, delete the folder, or go "
            f"on where it stopped: --set resume-from={folder}"
        )
    fills: dict[str, str | int] = {
        "output-dir": str(folder),
        "run-name": run.run_name or preset.name,
    }
    if not schedule.min_clients:
        # Simulated nodes come online one after the other: without this, round 1 may miss some.
        fills["min-clients"] = preset.engine.num_clients - preset.config.client.absent_clients
    return preset.with_config(fills)


def launch(preset: Preset, console: Console, *, tracker: str | None = None) -> int:
    """Run a preset, show its progress and its results; with `tracker` its rounds go there too.

    Returns 0 when the run completed, 1 when it failed, 130 when it was interrupted.
    """
    preset = complete(preset)
    folder = Path(preset.config.run.output_dir)
    if tracker:
        require(tracker)  # before anything is made or started
    folder.mkdir(parents=True, exist_ok=True)
    say(console, f"run folder  {folder}")
    with tracked(tracker, Run(folder, preset.config.flat())) as lines:
        code = _run(preset, folder, console)
    if (folder / "metrics.jsonl").exists():
        show(folder, console)
    for line in lines:
        say(console, line)
    say(console, f"run folder  {folder}")
    return code


def show(folder: Path, console: Console) -> None:
    """Print the tables of a run and draw its pictures; quiet where there is nothing yet."""
    try:
        run = Run.load(folder)
    except RunError:
        return
    for table in (run_table(run), *([family_table(run)] if run.clients else [])):
        console.print()
        console.print(table)
    if run.gain:
        say(console, f"\n{run.gain}", style="bold")
    if run.rows:
        curves, metrics = folder / "curves.png", folder / "metrics.jsonl"
        if not curves.exists() or curves.stat().st_mtime < metrics.stat().st_mtime:
            draw_curves(folder)  # the server has not
        console.print()
        for path in (curves, *([draw_clients(run)] if run.clients else [])):
            say(console, f"picture  {path}")


@contextlib.contextmanager
def open_engine(preset: Preset, log: Path) -> Iterator[Callable[[RunConfig], None]]:
    """Give what runs a config to its end or raises; Ray's SuperLink starts on entry.

    What server and clients print goes to `log`.
    """
    if preset.engine.name == "inprocess":
        yield partial(_run_inprocess, preset.engine, log)
        return
    client = preset.config.client
    names = (client.models, client.dataset, preset.config.distill.global_model)
    env = own_modules(names, Path.cwd()) | (OFFLINE if client.data_dir else {})
    with RayEngine(preset.engine, log=log, extra_env=env) as engine:
        yield engine.run


def _run_inprocess(engine: EngineSection, log: Path, config: RunConfig) -> None:
    from experiments.run.engines.inprocess import run_inprocess, simulated_nodes  # torch: seconds

    present = engine.num_clients - config.client.absent_clients
    with _log_to(log):
        run_inprocess(
            config,
            simulated_nodes(engine.num_clients)[:present],
            workers=engine.workers,
            batched_clients=batched_clients(engine, config),
        )


def batched_clients(engine: EngineSection, config: RunConfig) -> int:
    """Return how many clients train in one call; "auto" is for a GPU that several can fill."""
    from client_app.models.instances import pick_device

    if engine.batched_clients != "auto":
        return engine.batched_clients
    one_by_one = config.is_baseline or config.client.dp_noise or config.schedule.max_in_flight == 1
    if one_by_one or engine.workers or pick_device(config.client.device).type == "cpu":
        return 0
    return engine.num_clients


def _run(preset: Preset, folder: Path, console: Console) -> int:
    config, log = preset.config, folder / "run.log"
    seed = config.run.seed
    try:
        with terminate_as_interrupt(), open_engine(preset, log) as run:
            _prepare_data(config, console)
            check_clients(config, preset.engine)
            with follow(folder, rounds=config.run.rounds, console=console):
                run(config)
            if (status := read_json(folder / "summary.json").get("status")) != "completed":
                raise RunError(f"the run ended, but its summary says {status!r}.")
    except KeyboardInterrupt as stop:
        settle(folder, "interrupted", f"stopped by {stop or 'Ctrl-C'}", seed=seed)
        say(console, "interrupted", style="bold red", end="; ")
        say(console, _kept(folder))
        return INTERRUPTED
    except Exception as error:  # the edge: an engine raises whatever the run raised
        settle(folder, "failed", f"{type(error).__name__}: {error}", seed=seed)
        _explain(error, folder, console)
        return FAILED
    return 0


def _prepare_data(config: RunConfig, console: Console) -> None:
    if config.client.data_dir:
        os.environ.update(OFFLINE)
    with console.status(escape(f"preparing data: {config.client.dataset}")):
        from client_app.data.prepare import prepare_data  # imports torch: seconds
        from client_app.models.registry import model_for_partition

        model_for_partition(config.client.models, 0, config.client.num_partitions)
        place = prepare_data(config.client, seed=config.run.seed)
    say(console, f"data in {place}")


def check_clients(config: RunConfig, engine: EngineSection) -> None:
    """Build each model that the run config names, and look for the clients' device.

    A client that cannot build its model says so when it registers, and the server then waits for
    others until `wait-for-clients-s` is over; here it is told at once. Channels and classes come
    from the prepared data. Raises ConfigError or ModelError.
    """
    from client_app.data.examples import open_examples  # imports torch: seconds
    from client_app.models.building import AUTO, fitting, num_parameters
    from client_app.models.instances import pick_device
    from client_app.models.registry import build_model

    wish = config.client.device
    chosen = pick_device(wish).type == "cuda" and wish != "auto"
    if chosen and engine.name == "ray" and not engine.client_gpus:
        raise ConfigError(
            f"device = {wish!r}, but Ray gives clients no GPU: set the share of one that each "
            "client gets, for instance --set client-gpus=0.1."
        )
    data = open_examples(config.client)
    shape, is_floats = data.images.shape[1:], data.images.dtype.kind == "f"
    names = [name.strip() for name in config.client.models.split(",")]
    for name in dict.fromkeys([*names, *([config.distill.global_model] * config.distils)]):
        if name == AUTO:
            name = fitting(shape, is_pictures=bool(data.mean), is_floats=is_floats)
        model = build_model(name, in_channels=data.in_channels, num_classes=data.num_classes)
        size, limit = num_parameters(model), config.hypernet.max_parameters
        if size > limit:
            raise ConfigError(
                f"model {name!r} has {size:,} parameters here; the server accepts {limit:,} "
                "(max-parameters)."
            )


def _kept(folder: Path) -> str:
    """Say what a stopped run left to go on from."""
    from server_app.app import CHECKPOINTS  # imports torch: seconds
    from server_app.output.checkpoint import META, latest

    newest = latest(folder / CHECKPOINTS)
    if newest is None:
        return "it had no checkpoint yet (checkpoint-every): nothing is left to go on from"
    learned = read_json(newest / META)["rows"][-1]["round"]
    return f"the checkpoint is of round {learned:.0f}: go on with --set resume-from={folder}"


def _explain(error: Exception, folder: Path, console: Console) -> None:
    log = folder / "run.log"
    if not isinstance(error, MHpFedHNError):
        with log.open("a", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)))
    say(console, "failed", style="bold red", end=" ")
    say(console, read_json(folder / "summary.json")["reason"])
    if lines := error_lines(log):
        say(console, f"\nfrom {log}:", style="dim")
        say(console, "\n".join(lines))


def error_lines(log: Path, *, limit: int = 8) -> list[str]:
    """Return the last lines of a log that say why a run failed, without their tracebacks.

    Warnings, errors and the last lines of tracebacks; where there are none, the end of the log.
    """
    if not log.is_file():
        return []
    text = _ANSI.sub("", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.search(line) and not _NOISE.search(line)]
    return list(dict.fromkeys(telling or lines))[-limit:]


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Send Flower's and the project's log lines to a file instead of the terminal."""
    logger = logging.getLogger("flwr")
    kept = list(logger.handlers)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers = [handler]
    try:
        yield
    finally:
        logger.handlers = kept
        handler.close()
