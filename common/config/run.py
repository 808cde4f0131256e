"""What to run, and who trains when."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from common.config.section import Section, key
from common.methods import known_method


class RunSection(Section):
    """What to run, for how long, and where results go."""

    method: Annotated[str, AfterValidator(known_method)] = key(
        "mh-pfedhn-pg",
        '"mh-pfedhn"; "mh-pfedhn-gd" with one global model that all distil from; "mh-pfedhn-pg" '
        "with a personal common model for each; or a baseline: docs/baselines.md",
    )
    rounds: int = key(28, "one round is one pass over the clients present", ge=1)
    patience: int = key(
        0,
        "end the run after so many rounds without a better accuracy on validation examples; 0: not",
        unit="rounds",
        ge=0,
    )
    seed: int = key(42, "of the data split, first weights, the order of clients, batches", ge=0)
    evaluation: Literal["separate", "fused"] = key(
        "separate",
        '"separate": test fresh weights after the round; "fused": in the next training message',
    )
    evaluate_every: int = key(
        1, "rounds between separate evaluations", unit="rounds", where='evaluation "separate"', ge=1
    )
    output_dir: str = key("", "absolute folder of this run; empty: ~/mh-pfedhn-runs/<name>-<time>")
    run_name: str = key(
        "", "in the name of the folder where output-dir is empty; empty: the method"
    )
    resume_from: str = key("", "a run folder or checkpoint to go on from; empty: a new run")
    novel_only: bool = key(
        False,
        "with resume-from: freeze what was learned, only new clients learn",
        where="MH-pFedHN",
    )
    client_keys: Literal["auto", "bind", "ignore"] = key(
        "auto",
        'bind client-ids to the SuperNode keys that first used them: "bind", "ignore", or "auto" '
        "where the operator registered the SuperNode under a name",
    )
    checkpoint_every: int = key(
        1, "rounds between checkpoints; the last round always has one", unit="rounds", ge=1
    )
    keep_checkpoints: int = key(3, "the newest so many; an older one serves a damaged newest", ge=1)
    server_device: str = key("cpu", '"cpu", "cuda" or "auto", for the hypernetwork')


class ScheduleSection(Section):
    """Who trains when (docs/parallel.md), patience with stragglers, and what a delta may be."""

    max_in_flight: int = key(
        0, "clients that train at the same time; 0: all; 1, with buffer-size 1: as published", ge=0
    )
    clients_per_round: float = key(
        0.0, "of those present so many train in a round: a number, below 1 a fraction; 0: all", ge=0
    )
    client_sampling: Literal["uniform", "examples", "round-robin"] = key(
        "uniform",
        'who: "uniform", "examples" (the more the likelier), "round-robin" (who waited longest)',
        where="clients-per-round",
    )
    buffer_size: int = key(
        0, "updates of one server step; 0: as many as are in flight, which is also the most", ge=0
    )
    min_clients: int = key(
        0, "wait for so many before a round; 0: for three before the first, then for one", ge=0
    )
    wait_for_clients_s: float = key(
        300.0, "how long min-clients are waited for; then the run stops", unit="s", ge=0
    )
    close_fraction: float = key(
        1.0,
        "a round, and each cohort, goes on when this fraction has replied; at least min-fraction",
        gt=0,
        le=1,
    )
    min_fraction: float = key(0.5, "usable updates a round needs, of those asked", ge=0, le=1)
    round_deadline_s: float = key(
        0.0, "after it a client gives up its slot and the round goes on; 0: never", unit="s", ge=0
    )
    message_timeout_s: float = key(
        3600.0, "after it a reply is not waited for at all: counted as failed", unit="s", gt=0
    )
    max_staleness: int = key(
        20,
        "server steps after which an update is dropped, beyond those of the schedule in a round",
        unit="server steps",
        ge=0,
    )
    max_delta_norm: float = key(
        1e4, "a delta with a larger Euclidean norm is rejected", unit="norm", gt=0
    )
    clip_to_median: float = key(
        1.5,
        "no delta counts for more than this multiple of the median norm in its head group; 0: off",
        where="MH-pFedHN",
        ge=0,
    )
