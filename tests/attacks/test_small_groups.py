"""One that registers as many parameters as another has, to see what it learns, or to spoil it."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from common.config import RunConfig
from server_app.clients import GLOBAL_ID, Client
from server_app.methods.base import Upload
from server_app.methods.mhpfedhn import Deltas, MHpFedHN, MHpFedHNPG, common_id

VICTIM, COMMON = 9_000, 500
OTHERS = [Client(f"site-{i}", 2_000, 100, num_global_parameters=COMMON) for i in range(8)]
SPOIL: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "nothing": lambda delta: 0 * delta,
    "away": lambda delta: -100 * delta,
    "noise": lambda delta: np.random.default_rng(0).normal(0, 30, len(delta)).astype(np.float32),
}


def client(name: str, size: int = VICTIM) -> Client:
    return Client(name, size, 100, num_global_parameters=COMMON)


class Server:
    """The server's half of a run of MH-pFedHN-PG, over deltas that are drawn."""

    def __init__(self, clients: list[Client], **settings: str | int) -> None:
        keys = {"method": "mh-pfedhn-pg", **{k.replace("_", "-"): v for k, v in settings.items()}}
        self.method: MHpFedHN = MHpFedHNPG(MHpFedHNPG.adapted(RunConfig.parse(keys)))
        self.rng, self.rounds = np.random.default_rng(1), 0
        self.clients = [*clients]
        for one in clients:
            self.method.add_client(one)

    def join(self, one: Client) -> None:
        self.method.add_client(one)
        self.clients.append(one)

    def theta(self, name: str) -> np.ndarray:
        (one,) = [one for one in self.clients if one.client_id == name]
        return next(iter(self.method.contents([one], training=True))).arrays["theta"].copy()

    def round(
        self, lies: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None
    ) -> dict[str, np.ndarray]:
        """Let everybody send a delta; return what was sent, by client."""
        self.rounds, sent, uploads = self.rounds + 1, {}, []
        for one in self.clients:
            drawn = self.rng.normal(0, 0.01, one.num_parameters).astype(np.float32)
            sent[one.client_id] = (lies or {}).get(one.client_id, lambda x: x)(drawn)
            common = self.rng.normal(0, 0.01, COMMON).astype(np.float32)
            uploads.append(Upload(one, 100, Deltas(sent[one.client_id], common)))
        self.method.learn(uploads, server_round=self.rounds, progress=float(self.rounds))
        return sent


def test_a_newcomer_of_the_same_size_is_sent_nothing_of_it() -> None:
    server = Server([*OTHERS, client("victim")])
    for _ in range(4):
        server.round()
    assert np.linalg.norm(server.theta("victim")) > 1
    server.join(client("spy", VICTIM - 5))
    assert not server.theta("spy").any()
    for _ in range(3):
        server.round({"spy": SPOIL["nothing"]})
        assert not server.theta("spy").any()


@pytest.mark.parametrize("lie", SPOIL)
def test_nor_does_it_move_it(lie: str) -> None:
    server = Server([*OTHERS, client("victim"), client("liar")])
    before = server.theta("victim")
    for _ in range(3):
        sent = server.round({"liar": SPOIL[lie]})
        after = server.theta("victim")
        np.testing.assert_allclose(before - after, sent["victim"], atol=1e-6)
        before = after


def test_what_it_sent_costs_nobody_anything_when_a_third_joins() -> None:
    server = Server([*OTHERS, client("victim"), client("liar")])
    for _ in range(12):
        sent = server.round({"liar": SPOIL["noise"]})
    before, own = server.theta("victim"), np.linalg.norm(sent["victim"])
    assert np.linalg.norm(before) > 3 * own
    server.join(client("third"))
    server.round()
    assert np.linalg.norm(server.theta("victim") - before) < 2 * own


def test_two_that_are_left_of_three_share_nothing_any_more() -> None:
    server = Server([*OTHERS, client("a"), client("b"), client("c")])
    alike = server.rng.normal(0, 0.01, VICTIM).astype(np.float32)
    kinds = {"a": alike, "b": alike, "c": -alike}
    for _ in range(3):
        server.round({n: lambda delta, x=x: x + 0.1 * delta for n, x in kinds.items()})
    names, likeness = server.method.hypernet.kernel(server.method.hypernet.group_key("a"), ["a"])
    assert likeness[0, names.index("b")] > 0.2
    server.method.forget_client("c")
    server.clients.pop()
    for lie in SPOIL.values():
        before = server.theta("a")
        sent = server.round({"b": lie})
        np.testing.assert_allclose(before - server.theta("a"), sent["a"], atol=1e-5)


def upload(one: Client) -> Upload[Deltas]:
    return Upload(one, 100, Deltas(*(np.full(n, 0.01, np.float32) for n in (VICTIM, COMMON))))


def shares(server: Server, one: str, other: str) -> bool:
    """Whether what one client sends moves another's parameters."""
    moved = []
    for lie in (SPOIL["nothing"], lambda delta: delta):
        before = server.theta(other)
        sent = server.round({one: lie})
        own = before - server.theta(other) - sent[other]
        moved.append(float(np.abs(own).max()) > 1e-6)
    return any(moved)


def test_three_share_and_so_do_two_who_are_all_or_chose_one_another() -> None:
    two = [client("a"), client("b")]
    assert not shares(Server([*OTHERS, *two]), "a", "b")
    assert shares(Server(two), "a", "b")
    assert shares(Server([*OTHERS, *two], min_sharing=2), "a", "b")
    assert not shares(Server([*OTHERS, *two, client("c")], min_sharing=4), "a", "b")
    assert shares(Server([*OTHERS, *two, client("c")]), "a", "b")
    named = [Client(n, VICTIM, 100, num_global_parameters=COMMON, group="1f0c") for n in "ab"]
    strangers = [
        Client(o.client_id, 2_000, 100, num_global_parameters=COMMON, group="77") for o in OTHERS
    ]
    assert shares(Server([*strangers, *named], head_sharing="tag"), "a", "b")


def test_a_new_one_of_two_learns_by_itself_where_all_else_is_frozen() -> None:
    server = Server([*OTHERS, client("old")])
    server.round()
    server.method.rule.freeze(server.method.hypernet.groups)
    server.clients = []
    server.join(client("new"))
    old = server.method.hypernet.personal["old"].clone()
    before = server.theta("new")
    sent = server.round()
    np.testing.assert_allclose(before - server.theta("new"), sent["new"], atol=1e-6)
    assert torch.equal(server.method.hypernet.personal["old"], old)


def test_two_replies_of_one_step_count_as_their_mean() -> None:
    server = Server([*OTHERS, client("a")])
    before, one = server.theta("a"), server.clients[-1]
    common = np.zeros(COMMON, np.float32)
    deltas = [np.full(VICTIM, x, np.float32) for x in (0.01, 0.03)]
    server.method.learn(
        [Upload(one, 100, Deltas(delta, common)) for delta in deltas], server_round=1, progress=1.0
    )
    np.testing.assert_allclose(before - server.theta("a"), 0.02, atol=1e-6)


@pytest.mark.parametrize("is_known", [True, False], ids=["silent", "never sends"])
def test_a_third_that_sends_nothing_leaves_two(is_known: bool) -> None:
    """Else the spy, which knows its own delta, could solve for the victim's."""
    server = Server([*OTHERS, client("victim"), client("spy"), client("third")])
    third = server.clients.pop()
    if is_known:
        server.method.learn([upload(third)], server_round=1, progress=1.0)
    for _ in range(4):
        server.round({"spy": SPOIL["nothing"]})
    for lie in SPOIL.values():
        victim, spy = server.theta("victim"), server.theta("spy")
        sent = server.round({"spy": lie})
        np.testing.assert_allclose(victim - server.theta("victim"), sent["victim"], atol=1e-5)
        np.testing.assert_allclose(spy - server.theta("spy"), sent["spy"], rtol=1e-4, atol=1e-5)


def test_one_that_is_fast_makes_nobody_silent() -> None:
    server = Server([*OTHERS, client("a"), client("b"), client("fast")])
    server.round()
    for i in range(12):
        server.method.learn([upload(server.clients[-1])], server_round=i, progress=1.0)
    hypernet = server.method.hypernet
    assert hypernet.num_sharing(hypernet.group_key("a")) == 3


def test_what_one_learned_by_itself_is_never_taken_by_others() -> None:
    """Not even where more come, and what the liar sends then is like what the victim does."""
    server = Server([*OTHERS, client("victim"), client("liar")])
    for _ in range(5):
        server.round({"liar": SPOIL["noise"]})
    before = server.theta("victim")
    server.join(client("third"))
    server.join(client("fourth"))
    alike = server.rng.normal(0, 0.01, VICTIM).astype(np.float32)
    ways = {"victim": 1, "liar": 1, "third": -1, "fourth": -1}
    for _ in range(5):
        server.round(
            {n: lambda delta, way=way: way * alike + 0.1 * delta for n, way in ways.items()}
        )
    hypernet = server.method.hypernet
    names, likeness = hypernet.kernel(hypernet.group_key("victim"), ["victim"])
    assert likeness[0, names.index("liar")] > 0.3
    assert np.linalg.norm(server.theta("victim") - before) < 20 * np.linalg.norm(alike)


def test_the_first_ones_common_model_is_not_the_seconds() -> None:
    server = Server([client("first")])
    for _ in range(3):
        server.round()
    server.join(client("second"))
    ((_, mine), (_, theirs)) = server.method.hypernet.thetas([*map(common_id, ("first", "second"))])
    assert mine.any()
    assert not theirs.any()


def test_common_models_are_shared_whatever_the_architectures_are() -> None:
    server = Server([client("a", 2_000), client("b", 5_000)])
    hypernet = server.method.hypernet
    assert hypernet.num_sharing(hypernet.group_key(common_id("a"))) == 2
    ((_, before),) = hypernet.thetas([common_id("a")])
    first = np.where(np.arange(COMMON) < COMMON // 2, 0.01, 0.0).astype(np.float32)
    uploads = [
        Upload(server.clients[0], 100, Deltas(np.zeros(2_000, np.float32), first)),
        Upload(server.clients[1], 100, Deltas(np.zeros(5_000, np.float32), 0.01 - first)),
    ]
    server.method.learn(uploads, server_round=1, progress=1.0)
    ((_, after),) = hypernet.thetas([common_id("a")])
    assert (before - after)[COMMON // 2 :].mean() > 1e-3, "what the other one alone has changed"


def test_the_global_model_is_everybodys() -> None:
    method = MHpFedHN(MHpFedHN.adapted(RunConfig.parse({"method": "mh-pfedhn-gd"})))
    for name in "abcd":
        method.add_client(client(name))
    assert method.hypernet.num_sharing(method.hypernet.group_key(GLOBAL_ID)) == 1
