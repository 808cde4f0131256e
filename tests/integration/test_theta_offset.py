"""Under the kernel rule what is generated is added to what a model's own code draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from safetensors.torch import load_file

from client_app.models.building import ModelKind, draw_theta
from common.errors import CheckpointError
from common.seeding import stream_seed
from tests.support.tiny import HERE, Handler, Wrapped, run_tiny, tiny_config

SETTINGS = {
    "server_rule": "kernel",
    "personal_gain": 0.3,
    "max_in_flight": 0,
    "buffer_size": 0,
    "evaluation": "fused",
}


def test_clients_start_from_their_own_initialisation(tmp_path: Path) -> None:
    sent: dict[tuple[str, int, int], np.ndarray] = {}

    def record(message: Message, context: Context, handler: Handler) -> Message:
        reply = handler(message, context)
        if message.metadata.message_type.startswith("train"):
            number = int(message.content["config"]["server-round"])
            partition = int(context.node_config["partition-id"])
            for content in (message.content, reply.content):
                for name, array in content["arrays"].items():
                    sent[(name, number, partition)] = array.numpy()
        return reply

    models = f"{HERE}:small,{HERE}:steady"
    config = tiny_config(tmp_path, models=models, rounds=3, **SETTINGS)
    run_tiny(config, app=Wrapped(record))

    assert not sent["theta", 1, 0].any()  # the base is zero: all there is comes from the own start
    assert not sent["theta", 1, 5].any()
    assert sent["delta", 1, 0].any()
    assert sent["theta", 2, 5].any()

    stored = load_file(tmp_path / "run/personal-models/5/personal_model.safetensors")
    own = torch.cat([stored[name].reshape(-1) for name in PARAMETERS])
    kind = ModelKind(f"{HERE}:steady", 1, 4, torch.device("cpu"))
    start = draw_theta(kind, stream_seed(config.run.seed, "theta-offset"))
    drift = own - start
    assert 0 < float(drift.norm()) < float(start.norm())
    gammas = stored["norm.weight"]  # U(-1/sqrt(16), 1/sqrt(16)) where they are generated whole
    torch.testing.assert_close(gammas, torch.ones(4), rtol=0, atol=0.5)


PARAMETERS = ("conv.weight", "conv.bias", "norm.weight", "norm.bias", "head.weight", "head.bias")


def test_what_was_learned_for_another_start_is_not_resumed(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rounds=1, **SETTINGS)
    run_tiny(config)
    again = config.with_overrides({"rounds": 2, "resume-from": config.run.output_dir})
    with pytest.raises(CheckpointError, match=r"learned with seed .* Set seed to"):
        run_tiny(again.with_overrides({"seed": config.run.seed + 1}))
    with pytest.raises(CheckpointError, match="learned with server-rule = 'kernel'; this run has"):
        run_tiny(again.with_overrides({"server-rule": "adam"}))
    run_tiny(again)
