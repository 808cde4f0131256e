"""The shape of the hypernetwork and the rule that moves it."""

from __future__ import annotations

from typing import Literal

from common.config.section import Section, key

OURS = "MH-pFedHN"
KERNEL = 'server-rule "kernel"'
ADAM = 'server-rule "adam"'


class HypernetSection(Section):
    """Shape and start of the hypernetwork (docs/method.md, "Hypernetwork")."""

    chunk_size: int = key(
        3072,
        "parameters that one head generates; the kernel rule tells clients by so many of the last",
        where=OURS,
        ge=1,
    )
    embed_dim: int = key(256, "length of a client's embedding; as published: 64", where=OURS, ge=1)
    hidden_dim: int = key(32, "width of the trunk", where=ADAM, ge=1)
    embedding_std: float = key(
        1.0, "standard deviation of the embeddings as drawn", where=ADAM, ge=0
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
    min_sharing: int = key(
        3,
        "fewer clients of a group share nothing, unless they are all or have a tag; of 2 that do, "
        "each can compute what the other learns",
        where=KERNEL,
        ge=2,
    )
    global_parameters: int = key(
        0,
        "size that everybody's global-model must have; 0: what most of the first to register have",
        unit="parameters",
        ge=0,
    )
    max_parameters: int = key(12_000_000, "cap on a client's model", unit="parameters", ge=1)


class UpdateSection(Section):
    """The server's rule: the kernel rule, or Adam as published (docs/method.md)."""

    server_rule: Literal["kernel", "adam"] = key("kernel", 'or "adam", as published', where=OURS)
    shared_gain: float = key(
        1.0,
        "shared steps of a pass, in units of the clients' mean change; each step has at most 1",
        where=KERNEL,
        ge=0,
    )
    personal_gain: float = key(
        0.2,
        "rho: rho + (1 - rho)/N of a client's own change is followed in a group of N; alone all",
        where=KERNEL,
        ge=0,
        le=1,
    )
    user_dp_noise: float = key(
        0.0,
        "noise on what a group shares, in units of user-dp-clip by the number of updates, so that "
        "no single client shows to others; no sharing by likeness; 0: off",
        where="MH-pFedHN, MH-pFedHN-PG",
        ge=0,
    )
    user_dp_clip: float = key(
        1.0, "a longer delta is scaled down to it", where="user-dp-noise", unit="norm", gt=0
    )
    server_lr: float = key(2e-4, "Adam's rate of trunk and heads", where=ADAM, ge=0)
    embedding_lr: float = key(2e-4, "Adam's rate of the embeddings", where=ADAM, ge=0)
    lr_decay_from: float = key(
        0.6,
        "fraction of the rounds after which the server's rates and gains fall along a cosine to "
        "0.05 of themselves; 1: never",
        where=OURS,
        ge=0,
        le=1,
    )
