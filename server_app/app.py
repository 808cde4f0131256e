"""The Flower ServerApp: config -> registry -> hypernetwork -> strategy -> results."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import RunConfig
from common.errors import ConfigError
from common.log import logger
from server_app.hypernet import Hypernetwork
from server_app.mailbox import Mailbox
from server_app.norms import NormClip
from server_app.outputs import RunFolder, run_folder_path
from server_app.phases import Core
from server_app.registry import Registry
from server_app.replies import ReplyDesk
from server_app.snapshot import restore_server
from server_app.strategy import MHpFedHN
from server_app.update import ServerUpdate

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the method of the run config to its end; the folder of results is logged first and last.

    Raises
    ------
    MHpFedHNError
        The config cannot be used, or too few clients are left. What was learned is on disk.
    """
    config = RunConfig.parse(context.run_config)
    core, registry = build_core(config, grid), Registry(config.hypernet.max_parameters)
    folder = RunFolder(run_folder_path(config), config)
    logger.info("Results go to %s", folder.path)
    try:
        strategy = _prepare(core, registry, folder)
        strategy.start(grid)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        logger.log(
            logging.WARNING if stopped else logging.ERROR,
            "Run stopped: %s: %s",
            type(error).__name__,
            error,
        )
        folder.close("interrupted" if stopped else "failed", f"{type(error).__name__}: {error}")
        raise
    folder.close("completed")


def _prepare(core: Core, registry: Registry, folder: RunFolder) -> MHpFedHN:
    if core.config.run.novel_only and not core.config.run.resume_from:
        raise ConfigError(
            "novel-only = true, but there is nothing to freeze. Set resume-from to the run whose "
            "trunk and heads the new clients shall use."
        )
    if not core.config.run.resume_from:
        folder.begin()
        return MHpFedHN(core, registry, folder)
    source = Path(core.config.run.resume_from).expanduser()
    progress = restore_server(source, core, registry)
    folder.begin(progress.rows, progress.client_rows)
    return MHpFedHN(core, registry, folder, progress.server_round + 1)


def build_core(config: RunConfig, grid: Grid) -> Core:
    """Build the learning state and the way to the clients."""
    device = _server_device(config.run.server_device)
    hypernet = Hypernetwork(config.hypernet, seed=config.run.seed, device=device)
    return Core(
        config=config,
        federation_id=secrets.token_hex(8),
        hypernet=hypernet,
        update=ServerUpdate(hypernet, config.update, total_rounds=config.run.rounds),
        mailbox=Mailbox(grid, config.schedule.message_timeout_s),
        desk=ReplyDesk(config.schedule.max_delta_norm),
        norms=NormClip(config.schedule.clip_to_median),
    )


def _server_device(wish: str) -> torch.device:
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wish.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"server-device = {wish!r}, but torch sees no GPU here: use auto or cpu.")
    try:
        return torch.device(wish)
    except RuntimeError as error:
        raise ConfigError(
            f"server-device = {wish!r} is no torch device: auto, cpu, cuda."
        ) from error
