"""The shape of the hypernetwork and the rule that moves it."""

from __future__ import annotations

from typing import Literal

from common.config.section import Section, key

BY_SIZE = -1.0
"""A gain that follows from the number of clients of a head group (`least_squares`)."""

OURS = "MH-pFedHN"
SOLVED = 'server-rule "least-squares"'


class HypernetSection(Section):
    """Shape and start of the hypernetwork (docs/method.md, "Hypernetwork")."""

    chunk_size: int = key(3072, "parameters that one head generates", where=OURS, ge=1)
    embed_dim: int = key(64, "length of a client's embedding", where=OURS + ", pFedHN", ge=1)
    hidden_dim: int = key(
        32,
        "width of the trunk; with least squares at least the clients that share heads, less one",
        where=OURS,
        ge=1,
    )
    embedding_std: float = key(
        1.0,
        "standard deviation of the embeddings as drawn; with least squares at least 0.1",
        where=OURS,
        ge=0,
    )
    head_init: Literal["torch", "shared", "zero"] = key(
        "zero",
        'what heads start from: "zero", for clients with a theta-offset; "shared": one model for '
        'all clients of a group; "torch": as published',
        where=OURS,
    )
    head_sharing: Literal["chunks", "tolerance", "tag", "own"] = key(
        "chunks",
        'who shares heads: equally many "chunks" (as published); sizes within a "tolerance"; a '
        'declared "tag" (node config: head-tag); each its "own"',
        where=OURS,
    )
    sharing_tolerance: float = key(
        0.25,
        "how much larger the largest of a group may be than its smallest",
        where='head-sharing "tolerance"',
        gt=0,
    )
    max_parameters: int = key(12_000_000, "cap on a client's model", unit="parameters", ge=1)


class UpdateSection(Section):
    """The server's rule: least squares, or Adam as published (docs/method.md, docs/parallel.md).

    Least squares moves the heads so that the generated parameters go where the deltas point;
    trunk and embeddings keep Adam, or stand still where both rates are 0.
    """

    server_rule: Literal["adam", "least-squares"] = key(
        "least-squares", 'or "adam", as published', where=OURS
    )
    shared_gain: float = key(
        1.0,
        "shared steps of a pass, in units of the clients' mean change; each step has at most 1",
        where=SOLVED,
        ge=0,
    )
    shared_momentum: float = key(
        BY_SIZE,
        "Nesterov, of a pass; -1: 1 - max(5/N, 6/rounds), at least 0, for the N clients of a group",
        where=SOLVED,
        lt=1,
    )
    personal_gain: float = key(
        BY_SIZE,
        "part of a client's own change that is followed; -1: max(1.4/N, 1.6/rounds), at most 1",
        where=SOLVED,
    )
    kernel_damping: float = key(
        1e-3,
        "ridge damping, relative to the mean squared norm of the centred features",
        where=SOLVED,
        gt=0,
    )
    server_lr: float = key(
        2e-4,
        'Adam\'s rate of the trunk, and of heads with "adam"; 0 here and below lets both rest',
        where=OURS,
        ge=0,
    )
    embedding_lr: float = key(2e-4, "Adam's rate of the embeddings", where=OURS, ge=0)
    lr_decay_from: float = key(
        0.6,
        "fraction of the rounds after which the server's rates and gains fall along a cosine to "
        "0.05 of themselves; 1: never",
        where=OURS,
        ge=0,
        le=1,
    )
