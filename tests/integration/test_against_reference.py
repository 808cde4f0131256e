"""The whole system, messages and all, against the slow and clear implementation of one round."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from safetensors.torch import load_file
from torch import nn

from client_app.data.examples import ClientData, load_client_data
from common.config import NodeConfig, RunConfig
from common.seeding import numpy_generator, torch_generator
from server_app.clients import GLOBAL_ID
from server_app.hypernet.network import Hypernetwork
from tests.reference.algorithm import Client, Hyper, ReferenceHypernet, one_round_gd, one_round_hn
from tests.support import tiny
from tests.support.tiny import HERE, Handler, Wrapped, run_tiny, tiny_config

ROUNDS = 2
HOMOGENEOUS = f"{HERE}:small"
HETEROGENEOUS = f"{HERE}:wide,{HERE}:steady,{HERE}:small"  # sizes not in ascending order
MODELS = {"small": tiny.small, "wide": tiny.wide, "steady": tiny.steady}


def recorder() -> tuple[Wrapped, dict[tuple[str, int, int], np.ndarray]]:
    """The real app, and every vector that crossed the wire by (name, round, partition)."""
    seen: dict[tuple[str, int, int], np.ndarray] = {}

    def record(message: Message, context: Context, handler: Handler) -> Message:
        reply = handler(message, context)
        if message.metadata.message_type.startswith("train"):
            where = (
                int(message.content["config"]["server-round"]),
                context.node_config["partition-id"],
            )
            for content in (message.content, reply.content):
                for name, array in content["arrays"].items():
                    seen[(name, *where)] = array.numpy()
        return reply

    return Wrapped(record), seen


def make_model(config: RunConfig, partition: int) -> nn.Module:
    names = config.client.models.split(",")
    name = names[partition * len(names) // 6].partition(":")[2]
    return MODELS[name](in_channels=1, num_classes=4)


def reference_clients(config: RunConfig, server_round: int, kept: dict[str, Client]) -> None:
    """Give each reference client the batches that the system's client sees in this round."""
    for partition in range(6):
        client_id, seed = str(partition), config.run.seed
        node = NodeConfig.parse({"partition-id": partition, "num-partitions": 6})
        section = node.client_section(config.client)
        data = load_client_data(
            section, partition_id=partition, seed=seed, device=torch.device("cpu")
        )

        def batches(purpose: str, data: ClientData = data, client_id: str = client_id) -> list:
            generator = torch_generator(
                config.run.seed, purpose, server_round=server_round, client_id=client_id
            )
            return list(data.batches(config.training.batch_size, generator))

        buffers = kept[client_id].buffers if client_id in kept else {}
        kept[client_id] = Client(
            make_model=lambda partition=partition: make_model(config, partition),
            batches=batches("shuffle"),
            global_batches=batches("shuffle-global"),
            buffers=buffers,
        )


def initial_state(config: RunConfig) -> tuple[dict, dict]:
    hypernet = Hypernetwork(config.hypernet, seed=config.run.seed)
    sizes = [sum(p.numel() for p in make_model(config, i).parameters()) for i in range(6)]
    for partition, size in enumerate(sizes):
        hypernet.add_client(str(partition), size)
        if partition == 0 and config.distils:
            hypernet.add_client(GLOBAL_ID, tiny_global_size())
    tensors, meta = hypernet.state_dict()
    return {name: tensor.clone() for name, tensor in tensors.items()}, meta


def tiny_global_size() -> int:
    return sum(p.numel() for p in tiny.small(in_channels=1, num_classes=4).parameters())


def hyper(config: RunConfig) -> Hyper:
    return Hyper(
        server_lr=config.update.server_lr,
        embedding_lr=config.update.embedding_lr,
        buffer_size=config.schedule.buffer_size,
        learning_rate=config.training.learning_rate,
        alpha=config.distill.distill_alpha,
        temperature=config.distill.distill_temperature,
    )


@pytest.mark.parametrize("models", [HOMOGENEOUS, HETEROGENEOUS])
@pytest.mark.parametrize("method", ["mh-pfedhn", "mh-pfedhn-gd"])
@pytest.mark.parametrize("cohort", [1, 3])
def test_system_equals_the_reference(tmp_path: Path, models: str, method: str, cohort: int) -> None:
    config = tiny_config(
        tmp_path,
        models=models,
        method=method,
        rounds=ROUNDS,
        max_in_flight=cohort,
        buffer_size=cohort,
        distill_alpha=0.3,
        distill_temperature=3.0,
    )
    app, seen = recorder()
    run_tiny(config, app=app)
    reference = ReferenceHypernet(*initial_state(config), hyper=hyper(config))
    clients: dict[str, Client] = {}
    for server_round in range(1, ROUNDS + 1):
        reference_clients(config, server_round, clients)
        rng = numpy_generator(config.run.seed, "client-order", server_round=server_round)
        order = [str(i) for i in rng.permutation(6)]
        if config.distils:
            trace = one_round_gd(
                reference,
                clients,
                order,
                global_id=GLOBAL_ID,
                make_global=lambda: tiny.small(in_channels=1, num_classes=4),
            )
        else:
            trace = one_round_hn(reference, clients, order)
        for client_id in order:
            where = server_round, int(client_id)
            close(seen["theta", *where], trace.theta[client_id])
            close(seen["delta", *where], trace.delta[client_id])
            if config.distils:
                close(seen["global-theta", *where], trace.global_theta)
                close(seen["global-delta", *where], trace.global_delta[client_id])
    path = next(Path(config.run.output_dir).glob("checkpoint/*/tensors.safetensors"))
    final = load_file(path)
    for name, expected in reference.state().items():
        close(final[name], expected)


def close(found: torch.Tensor | np.ndarray, expected: torch.Tensor | None) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5, rtol=0)
