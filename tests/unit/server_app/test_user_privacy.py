"""User-level privacy of the kernel rule: what one client can change in what all others see."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config import HypernetSection, RunConfig, UpdateSection
from common.errors import CheckpointError, ConfigError, RunError
from common.files import read_json
from common.user_privacy import RELEASES, UserPrivacy, clipped
from server_app.aggregation.kernel import KernelRule
from server_app.hypernet.groups import Update
from server_app.hypernet.kernel import KernelNetwork
from server_app.methods.mhpfedhn import MHpFedHN

SIZE, CLIP, CLIENTS = 30, 0.5, tuple("abcd")


def made(noise: float = 1.0, sharing: str = "chunks", seed: int = 1) -> KernelRule:
    shape = HypernetSection.model_validate({"chunk-size": 10, "head-sharing": sharing})
    network = KernelNetwork(shape, seed=3)
    for client_id in CLIENTS:
        network.add_client(client_id, SIZE)
    section = UpdateSection(user_dp_noise=noise, user_dp_clip=CLIP, lr_decay_from=1.0)
    rule = KernelRule(network, section, total_rounds=10)
    assert rule.privacy is not None
    rule.privacy = UserPrivacy(noise, CLIP, np.random.default_rng(seed))
    return rule


def deltas(seed: int, **replaced: Tensor) -> list[Update]:
    drawn = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(seed))
    found = dict(zip(CLIENTS, drawn, strict=True)) | replaced
    return [Update(client_id, delta) for client_id, delta in found.items()]


def test_one_client_moves_the_base_by_the_sensitivity_at_most() -> None:
    """All noise alike: what is left is what a's delta does, to the base and to b's weights."""
    far = torch.full((SIZE,), 1e6)
    rules = [made(), made(), made()]
    replacements = (far, -far, torch.zeros(SIZE))
    for rule, mine in zip(rules, replacements, strict=True):
        rule.step(deltas(1, a=mine), progress=0.0)
    bases = [rule.hypernet.groups["3"].base for rule in rules]
    assert float((bases[0] - bases[1]).norm()) == pytest.approx(2 * CLIP / 4, rel=1e-3)
    assert float((bases[0] - bases[2]).norm()) == pytest.approx(CLIP / 4, rel=1e-3)
    for i in (1, 2):  # b sees base and what is its own, which a's delta enters through the mean
        seen = [rules[j].hypernet.generate(["b"])["b"] for j in (0, i)]
        assert float((seen[0] - seen[1]).norm()) <= 2 * float((bases[0] - bases[i]).norm())


def test_the_noise_has_the_promised_size_and_comes_once_a_step() -> None:
    quiet, loud = made(1e-9), made(2.0)
    wide = 30_000
    for rule in (quiet, loud):
        for client_id in CLIENTS:
            rule.hypernet.remove_client(client_id)
            rule.hypernet.add_client(client_id, wide)
        updates = [Update(c, torch.ones(wide)) for c in CLIENTS]
        rule.step(updates, progress=0.0)
    key = quiet.hypernet.group_key("a")
    noise = loud.hypernet.groups[key].base - quiet.hypernet.groups[key].base
    assert float(noise.std()) == pytest.approx(2.0 * CLIP / 4, rel=0.02)


def test_nobody_takes_from_its_like_and_weights_are_equal() -> None:
    rule = made(1e-9)
    alike = deltas(2)
    rule.step([Update(u.client_id, u.delta, weight=5.0 if u.client_id == "a" else 1.0)
               for u in alike], progress=0.0)  # fmt: skip
    assert all(not v.any() for v in rule.hypernet.embeddings.values())
    _, kernel = rule.hypernet.kernel("3", list(CLIENTS))
    torch.testing.assert_close(kernel, torch.eye(4))
    mean = torch.stack([clipped(u.delta, CLIP) for u in alike]).mean(0)
    torch.testing.assert_close(rule.hypernet.groups["3"].base, -mean, rtol=1e-4, atol=1e-5)


def test_two_replies_of_one_client_in_a_step_count_once() -> None:
    twice = [*deltas(3), Update("a", torch.full((SIZE,), 9.0), staleness=1)]
    once, both = made(), made()
    once.step(deltas(3), progress=0.0)
    both.step(twice, progress=0.0)
    assert torch.equal(once.hypernet.groups["3"].base, both.hypernet.groups["3"].base)


def test_epsilon_counts_steps_and_survives_a_checkpoint() -> None:
    rule = made(4.0)
    for seed in range(3):
        rule.step(deltas(seed), progress=0.0)
    spent = rule.privacy_row()["user_epsilon"]
    again = made(4.0)
    for client_id in CLIENTS:
        again.hypernet.remove_client(client_id)
    again.hypernet.load_state_dict(*rule.hypernet.state_dict())
    again.load_state_dict(*rule.state_dict())
    assert again.privacy_row()["user_epsilon"] == spent
    again.step(deltas(9), progress=0.0)
    assert again.privacy_row()["user_epsilon"] > spent > 0


def test_what_was_released_is_on_disk_before_it_can_be_sent(tmp_path: Path) -> None:
    rule = made(4.0)
    assert rule.privacy
    rule.privacy.keep_in(tmp_path)
    saved = rule.state_dict()
    for seed in range(3):
        rule.step(deltas(seed), progress=0.0)
    again = made(4.0)
    assert again.privacy
    again.load_state_dict(*saved)  # of before these steps
    again.privacy.keep_in(tmp_path / "elsewhere", tmp_path)
    assert again.privacy_row() == rule.privacy_row()
    (tmp_path / "elsewhere").mkdir()
    again.step(deltas(3), progress=0.0)
    assert read_json(tmp_path / "elsewhere" / RELEASES) == dict.fromkeys(CLIENTS, 4)
    again.privacy.keep_in(tmp_path / "nowhere")
    base = again.hypernet.groups["3"].base.clone()
    with pytest.raises(RunError, match="cannot be written"):
        again.step(deltas(4), progress=0.0)
    assert torch.equal(again.hypernet.groups["3"].base, base)


@pytest.mark.parametrize("text", ["", '{"a": 2', "[]", '{"a": "x"}', '{"a": -1}', '{"a": NaN}'])
def test_a_damaged_count_is_no_count_of_nothing(tmp_path: Path, text: str) -> None:
    rule = made(4.0)
    (tmp_path / RELEASES).write_text(text)
    assert rule.privacy
    with pytest.raises(CheckpointError, match=f"{RELEASES} does not say what was released"):
        rule.privacy.keep_in(tmp_path)


def test_what_nobody_shares_gets_no_noise() -> None:
    first, second = made(sharing="own", seed=1), made(sharing="own", seed=2)
    for rule in (first, second):
        rule.step(deltas(1), progress=0.0)
    assert torch.equal(first.hypernet.generate(["a"])["a"], second.hypernet.generate(["a"])["a"])
    assert first.privacy_row() == {"user_epsilon": 0.0}


def test_two_servers_with_one_seed_draw_different_noise() -> None:
    first, second = (UserPrivacy(1.0, 1.0).noise_like(torch.zeros(50), 1) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"server-rule": "adam"}, "server-rule = 'adam'"),
        ({"method": "mh-pfedhn-gd"}, "mh-pfedhn-gd"),
    ],
)
def test_what_it_does_not_cover_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"user-dp-noise = 1 covers .*{reason}"):
        RunConfig.parse({"user-dp-noise": 1.0, **changes})


def test_the_median_of_others_lengths_clips_nobody() -> None:
    shape = {"models": "mlp", "dataset": "digits"}
    bounds = {"clip-to-median": 1.0, "user-dp-noise": 1.0}
    long = [Update(c, torch.full((SIZE,), 1.0 + 9.0 * (c == "a"))) for c in CLIENTS]
    for settings, kept in ((bounds, True), ({"clip-to-median": 1.0}, False)):
        method = MHpFedHN(RunConfig.parse({"method": "mh-pfedhn", **shape, **settings}))
        clipped_all = method.clip.clip_all(long, lambda _: "3")
        assert torch.equal(clipped_all[0].delta, long[0].delta) == kept
