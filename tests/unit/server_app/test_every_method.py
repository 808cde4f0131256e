"""What holds for the server of every method: saved, restored, and what registration must bring."""

from dataclasses import replace

import numpy as np
import pytest

from common.errors import ConfigError, RegistrationError
from common.messages import Registration
from common.methods import METHODS
from server_app.clients import Client
from server_app.methods.base import Upload
from server_app.methods.mhpfedhn import Deltas
from tests.unit.server_app.servers import adapted, client, config, learn, make, means, open_round


def uploads_for(method: str, clients: list[Client]) -> list[Upload]:
    rng = np.random.default_rng(8)
    size = {"fml": 5, "fedkd": 5, "lg-fedavg": 16}.get(method, 6)
    made = []
    for c in clients:
        content: object = rng.normal(size=size).astype(np.float32)
        if method in ("fedproto", "fedgh", "fedtgp", "fd"):
            content = means(rng, [0, 2, 2], 4 if method == "fd" else 3)
        if method.startswith("mh-"):
            shared = rng.normal(size=5).astype(np.float32) if method == "mh-pfedhn-pg" else None
            content = Deltas(content, shared)
        made.append(Upload(c, 10, None if method.startswith("local") else content))
    return made


@pytest.mark.parametrize("method", METHODS)
def test_restored_server_goes_on_as_if_nothing_had_happened(method: str) -> None:
    clients = [client("a"), client("b")]
    whole, again = make(method), make(method)
    open_round(whole, clients)
    learn(whole, uploads_for(method, clients), 1)
    tensors, meta = whole.state_dict()
    again.load_state_dict({name: x.clone() for name, x in tensors.items()}, meta)
    for server in (whole, again):
        open_round(server, clients)
        learn(server, uploads_for(method, clients)[1:], 2)
    for c in clients:
        first, second = (
            next(server.contents([c], training=False)).arrays for server in (whole, again)
        )
        assert first.keys() == second.keys()
        assert bool(first) == (not method.startswith("local"))
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("method", METHODS)
def test_a_server_that_learned_nothing_can_be_saved(method: str) -> None:
    tensors, meta = make(method).state_dict()
    make(method).load_state_dict(tensors, meta)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("fedavg", {"group": ""}, "group is missing, which fedavg needs"),
        ("fedproto", {"feature_dim": 0}, "feature_dim is missing, which fedproto needs"),
        ("fml", {"num_global_parameters": 0}, "num_global_parameters is missing, which fml needs"),
        (
            "fml",
            {"num_global_parameters": 10**9},
            "a shared model of 1,000,000,000 numbers",
        ),
        (
            "fedgh",
            {"feature_dim": 10**8},
            "a head of 400,000,004 numbers; at most 12,000,000 (max-parameters)",
        ),
        ("fd", {"num_classes": 4000}, "class means of 16,000,000 numbers"),
        ("fedtgp", {"feature_dim": 4000}, "a layer of 16,000,000 numbers"),
    ],
)
def test_registration_must_bring_what_the_method_needs(
    method: str, change: dict, message: str
) -> None:
    facts = {"num_global_parameters": 5, "group": "aa", "num_classes": 4, "feature_dim": 3}
    good = Registration("a", 6, 10, **{k: facts[k] for k in METHODS[method].needs})
    make(method).admit(good, None)
    with pytest.raises(RegistrationError) as caught:
        make(method).admit(replace(good, **change), None)
    assert message in str(caught.value)


def test_clients_must_agree_on_what_they_share() -> None:
    other = Registration("z", 6, 10, num_classes=4, feature_dim=8)
    with pytest.raises(
        RegistrationError, match="client z has feature_dim = 8; the federation's is 3"
    ):
        make("fedproto").admit(other, client("a"))
    tagged = Registration("z", 6, 10, group="aa")
    make("fedavg").admit(tagged, client("a"))  # shares no features
    with pytest.raises(RegistrationError, match="declares num_classes, for which fedavg has no"):
        make("fedavg").admit(replace(tagged, num_classes=10**9), None)


def test_synchronous_baselines_fold_everybody_at_once_whatever_the_preset_says() -> None:
    section = adapted("fedavg", max_in_flight=1, buffer_size=1).schedule
    assert (section.max_in_flight, section.buffer_size, section.max_staleness) == (0, 0, 0)
    assert adapted("pfedhn", models="cnn", max_in_flight=1).schedule.max_in_flight == 1
    assert adapted("mh-pfedhn") == config("mh-pfedhn")


def test_novel_only_is_for_hypernetworks() -> None:
    with pytest.raises(ConfigError, match="novel-only freezes a hypernetwork, and fedavg has none"):
        adapted("fedavg", novel_only=True)
