"""The Flower ServerApp: config -> method -> registry -> rounds -> results."""

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
from server_app.aggregation.adam import ServerUpdate
from server_app.aggregation.clipping import NormClip
from server_app.clients import Registry
from server_app.hypernet.network import Hypernetwork
from server_app.methods.base import Method
from server_app.methods.baseline import BaselineMethod, effective_config
from server_app.methods.mhpfedhn import MHpFedHN
from server_app.methods.phases import Core
from server_app.output.run_folder import RunFolder, run_folder_path
from server_app.output.snapshot import restore_server
from server_app.replies import ReplyDesk
from server_app.strategy import Rounds
from server_app.transport import Mailbox
from server_app.trips import Post

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the method of the run config to its end; the folder of results is logged first and last.

    Raises
    ------
    MHpFedHNError
        The config cannot be used, or too few clients are left. What was learned is on disk.
    """
    config = effective_config(RunConfig.parse(context.run_config))
    method, registry = build(config, grid)
    folder = RunFolder(run_folder_path(config), config)
    logger.info("Results go to %s", folder.path)
    try:
        _prepare(method, registry, folder).start(grid)
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


def build(config: RunConfig, grid: Grid) -> tuple[Method, Registry]:
    """Build the method that the config names, and a registry that knows its rules."""
    cap = config.hypernet.max_parameters
    if not config.is_baseline:
        return MHpFedHN(build_core(config, grid)), Registry(cap)
    method = BaselineMethod(build_post(config, grid))
    return method, Registry(cap, method.baseline.check)


def _prepare(method: Method, registry: Registry, folder: RunFolder) -> Rounds:
    run = method.post.config.run
    if run.novel_only and not run.resume_from:
        raise ConfigError(
            "novel-only = true, but there is nothing to freeze. Set resume-from to the run whose "
            "trunk and heads the new clients shall use."
        )
    if not run.resume_from:
        folder.begin()
        return Rounds(method, registry, folder)
    progress = restore_server(Path(run.resume_from).expanduser(), method, registry)
    folder.begin(progress.rows, progress.client_rows)
    return Rounds(method, registry, folder, progress.server_round + 1)


def build_post(config: RunConfig, grid: Grid) -> Post:
    """Build the way to the clients."""
    return Post(
        config=config,
        federation_id=secrets.token_hex(8),
        mailbox=Mailbox(grid, config.schedule.message_timeout_s),
        desk=ReplyDesk(config.schedule.max_delta_norm),
    )


def build_core(config: RunConfig, grid: Grid) -> Core:
    """Build the learning state and the way to the clients."""
    device = _server_device(config.run.server_device)
    hypernet = Hypernetwork(config.hypernet, seed=config.run.seed, device=device)
    return Core(
        **vars(build_post(config, grid)),
        hypernet=hypernet,
        update=ServerUpdate(hypernet, config.update, total_rounds=config.run.rounds),
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
