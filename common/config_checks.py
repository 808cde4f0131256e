"""Keys of different sections that do not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.errors import ConfigError

if TYPE_CHECKING:
    from common.config import RunConfig


def check_together(config: RunConfig) -> None:
    """Raise ConfigError when keys of different sections do not go together."""
    spread = config.hypernet.embedding_std
    if config.update.server_rule == "least-squares" and spread < 0.1:
        raise ConfigError(
            "run config: server-rule = 'least-squares' tells clients by their embeddings: "
            f"embedding-std = {spread} makes them all but equal, and the heads grow without "
            "bound. Set embedding-std = 1.0."
        )
    if config.wire.uplink_top_k < 1 and config.is_baseline:
        raise ConfigError(
            f"run config: uplink-top-k = {config.wire.uplink_top_k} shortens the deltas of "
            f"mh-pfedhn and mh-pfedhn-gd; method = {config.run.method!r} sends its arrays whole. "
            "Set uplink-top-k = 1."
        )
    if config.hypernet.head_init == "zero" and config.client.theta_offset == "none":
        raise ConfigError(
            "run config: head-init = 'zero' generates models of zeros, which do not learn. Set "
            "theta-offset = 'init' as well, or head-init = 'shared'."
        )
    u = config.update
    if u.server_rule == "adam" and not u.server_lr:
        raise ConfigError(
            "run config: server-lr = 0 with server-rule = 'adam': no head would ever learn. "
            "Set a rate; 0 is for server-rule = 'least-squares', which moves heads without one."
        )
    if config.run.novel_only and not u.embedding_lr:
        raise ConfigError(
            "run config: novel-only with embedding-lr = 0: embeddings are all that learns "
            "there. Set embedding-lr = 0.01, say."
        )
