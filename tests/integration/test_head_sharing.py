"""Whole runs under each criterion of head sharing; resumed, they are the same."""

from pathlib import Path

import pytest
from flwr.app import Context, Message

from common.config import RunConfig
from experiments.run.engines.inprocess import simulated_nodes
from tests.integration.conftest import Lines
from tests.support.outputs import client_rows, rows
from tests.support.tiny import HERE, Handler, Wrapped, run_tiny, tiny_config

KERNEL = {"server_rule": "kernel"}


def head_groups(config: RunConfig) -> list[str]:
    return [row["head_group"] for row in client_rows(config)]


@pytest.mark.parametrize(
    ("sharing", "settings", "groups"),
    [
        ("tolerance", {"sharing_tolerance": 1.0}, ["4", "4", "10", "10"]),
        ("tolerance", {**KERNEL, "sharing_tolerance": 1.0}, ["4", "4", "10", "10"]),
        ("tag", {**KERNEL, "method": "mh-pfedhn-gd"}, []),
        ("own", KERNEL, ["3-0", "3-1", "7-2", "7-3"]),
    ],
)
def test_groups_and_resume(tmp_path: Path, sharing: str, settings: dict, groups: list[str]) -> None:
    whole = tiny_config(
        tmp_path / "whole", head_sharing=sharing, rounds=3, checkpoint_every=1,
        keep_checkpoints=9, models=f"{HERE}:small,{HERE}:wide", num_partitions=4,
        max_in_flight=2, buffer_size=2, **settings,
    )  # fmt: skip
    run_tiny(whole, num_clients=4)
    assert not groups or head_groups(whole) == groups
    (tmp_path / "whole/run/checkpoint/checkpoint-00000003/manifest.json").unlink()
    again = {"resume-from": whole.run.output_dir, "output-dir": str(tmp_path / "again")}
    rest = whole.with_overrides(again)
    run_tiny(rest, num_clients=4)
    assert rows(rest) == rows(whole)
    assert head_groups(rest) == head_groups(whole)


def test_tags_are_declared_or_made_of_the_model_and_never_the_name(
    tmp_path: Path, logged: Lines
) -> None:
    sent: dict[str, str] = {}

    def overhear(message: Message, context: Context, handler: Handler) -> Message:
        reply = handler(message, context)
        if message.metadata.message_type == "query.register":
            config = reply.content["config"]
            if config["client-id"] == "4":
                del config["group"]
            else:
                sent[config["client-id"]] = config["group"]
        return reply

    nodes = [dict(node) for node in simulated_nodes(5)]
    for i in (0, 1):
        nodes[i]["head-tag"] = "hospitals"
    config = tiny_config(
        tmp_path, head_sharing="tag", rounds=1, models=f"{HERE}:small", num_partitions=5,
        max_in_flight=0, buffer_size=0, **KERNEL,
    )  # fmt: skip
    run_tiny(config, app=Wrapped(overhear), node_configs=nodes)
    assert sent["0"] == sent["1"] != sent["2"] == sent["3"]
    assert all(len(tag) == 16 and int(tag, 16) >= 0 for tag in sent.values())
    assert head_groups(config) == [f"3-{sent[c]}" for c in "0123"]
    assert [
        line for line in logged.lines if "client 4: group is missing, which mh-pfedhn needs" in line
    ]
