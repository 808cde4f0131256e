"""What a simulated run needs of every client, tried before the run starts.

A client that cannot build its model says so when it registers, and the server then waits for others
until `wait-for-clients-s` is over. The launcher sees the same settings and can tell at once.
"""

from __future__ import annotations

from common.config import RunConfig
from common.errors import ConfigError
from experiments.run.presets import EngineSection


def check_clients(config: RunConfig, engine: EngineSection) -> None:
    """Build each model that the run config names, and look for the clients' device.

    Call it when the data is prepared: channels and classes come from there. Raises ConfigError
    or ModelError where a model cannot be built or is too large, or there is no such device.
    """
    from client_app.data.examples import describe_data  # imports torch: seconds
    from client_app.models.instances import pick_device
    from client_app.models.registry import build_model
    from common.parameters import num_parameters

    wish = config.client.device
    chosen = pick_device(wish).type == "cuda" and wish != "auto"
    if chosen and engine.name == "ray" and not engine.client_gpus:
        raise ConfigError(
            f"device = {wish!r}, but Ray gives clients no GPU: set the share of one that each "
            "client gets, for instance --set client-gpus=0.1."
        )
    in_channels, num_classes = describe_data(config.client)
    names = [name.strip() for name in config.client.models.split(",")]
    for name in dict.fromkeys([*names, *([config.distill.global_model] * config.distils)]):
        model = build_model(name, in_channels=in_channels, num_classes=num_classes)
        size, limit = num_parameters(model), config.hypernet.max_parameters
        if size > limit:
            raise ConfigError(
                f"model {name!r} has {size:,} parameters here; the server accepts {limit:,} "
                "(max-parameters)."
            )
