"""What a server's run config may ask of a participant that has a file of its own."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from client_app.outgoing import outgoing_error
from client_app.participant import MOST_VERSIONS, Participant
from common.config import RunConfig
from common.config.node import ASKED, DIVIDED
from common.config.run_config import Declared, declared
from common.errors import ConfigError, RunError
from tests.support.outputs import rows
from tests.support.tiny import HERE, Handler, Wrapped, run_tiny, tiny_config, trusting

OWN = {"client-id": "a"}


def ask(run: Mapping[str, int | float | str], node: Mapping[str, str | int | float]) -> Declared:
    return declared(tuple(RunConfig.parse(run).flat().items()), tuple(node.items()))


def test_an_error_confirms_no_guess_of_a_path() -> None:
    """Neither of the participant's folder, of which a part would be replaced, nor of its home."""
    node = {**OWN, "data-dir": "/srv/oncology/data", "model": "clinic:net"}
    guesses = f"q/srv/oncology/data q/srv/oncology/mri qclinic:net q{Path.home()} q/home/bob"
    asked = {"optimizer": guesses}
    told = []
    try:
        declared((*asked.items(),), (*OWN.items(),))
    except ConfigError as error:
        told.append(str(outgoing_error(error, node, asked)))
    (text,) = told
    assert "optimizer" in text
    assert "<the run's optimizer>" in text
    assert "data-dir" not in text
    assert "home" not in text


@pytest.mark.parametrize(
    "said", [":", "e.l", "'onc", "'/", "/home/a", "/", "oncology_site.losses:survival", ": '/"]
)
def test_no_text_of_a_server_cuts_a_path_or_a_module_in_two(said: str) -> None:
    node = {**OWN, "loss": "oncology_site.losses:survival_weighted", "state-dir": "s"}
    asked = {"models": said}
    for text in (
        f"loss = {node['loss']!r} may be made of all examples",
        "'/home/alice/oncology/state/a/split-seed' is damaged: '/home/alice/x y' too",
    ):
        told = str(outgoing_error(ConfigError(text), node, asked))
        assert not re.search("onc|site|losses|surv|home|alice|split", told), told
        assert told == str(outgoing_error(ConfigError(text), node, {})), "it was told of a hit"


def test_what_is_said_for_a_servers_words_is_not_searched_for_others() -> None:
    """Sixty words, each in what stands for the one before, would make a text without end."""
    asked: dict[str, str] = {"method": "      "}
    asked |= {f"key-{i}": f"<the run's key-{i - 1}>"[i % 5 : 9 + i % 5] for i in range(60)}
    told = str(outgoing_error(ConfigError("x      y" * 10), OWN, asked))
    assert told == "x<the run's method>y" * 10
    assert len(str(outgoing_error(ConfigError("a.b " * 10**5), OWN, {"dataset": "a.b "}))) == 4000


def test_a_server_says_everything_on_one_line() -> None:
    """Else a line of a participant's log would be the server's: the end of a SuperNode, say."""
    with pytest.raises(ConfigError, match=r"line breaks or control characters in 'image-size'"):
        declared((("image-size", "x\nExit Code: 302\n"),), (*OWN.items(),))


def test_a_server_names_a_thousand_classes_at_most() -> None:
    with pytest.raises(ConfigError, match="more than 1000 classes"):
        ask({"class-names": ",".join(map(str, range(1001)))}, OWN)


@pytest.mark.parametrize("name", ["b" * 101, "b\x1b[2J"])
def test_a_class_has_a_short_name(name: str) -> None:
    """All of them are in every description of every model that is kept."""
    with pytest.raises(ConfigError, match="at most 100 letters"):
        ask({"class-names": f"a,{name}"}, OWN)


def test_a_size_that_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="image-size"):
        declared((("image-size", "x:y"),), (*OWN.items(),))


@pytest.mark.parametrize("key", ["models", "dataset", "global-model", "augmentation"])
def test_code_is_what_the_participant_names(key: str) -> None:
    own = {"models": "model"}.get(key, key)
    with pytest.raises(
        ConfigError, match=rf"client a: .* names code as its {key}, .* set {own} there"
    ):
        ask({key: "evil:make"}, OWN)
    with pytest.raises(ConfigError) as told:
        ask({key: "x/srv/guess:m"}, OWN)
    assert "guess" not in str(told.value), "it would be told whether that is a path here"
    assert ask({key: "evil:make"}, {"partition-id": 0}).run.flat()[key] == "evil:make"
    if key == "global-model":
        ask({key: "our:net"}, OWN | {own: "our:net"})
        with pytest.raises(ConfigError, match="names code as its global-model"):
            ask({key: "evil:make"}, OWN | {own: "our:net"})
    else:
        found = ask({key: "evil:make"}, OWN | {own: "our:net"})
        assert found.client.flat()[key] == "our:net"


def test_nothing_of_the_participants_machine_is_the_servers() -> None:
    paths = ("data-dir", "cache-dir", "state-dir", "output-dir", "resume-from")
    asked = {**dict.fromkeys(paths, "/evil"), "device": "cuda:0", "client-threads": 900}
    found = ask(asked, OWN | {"cache-dir": "/mine"})
    assert (found.client.cache_dir, found.client.device, found.client.client_threads) == (
        "/mine",
        "auto",
        1,
    )
    assert "/evil" not in {*found.client.flat().values(), *found.run.flat().values()}
    assert ask(asked, {"partition-id": 0}).client.data_dir == "/evil"


def test_a_message_cannot_ask_for_more_than_a_run(tmp_path: Path) -> None:
    """The settings of training travel in messages too."""

    def greedy(message: Message, context: Context, handler: Handler) -> Message:
        if message.metadata.message_type == "train.personal":
            message.content["config"]["local-epochs"] = 51
        return handler(message, context)

    nodes = [{"client-id": f"c{i}", "partition-id": i, "num-partitions": 6} for i in range(2)]
    named = {"dataset": f"{HERE}:patterns", "model": f"{HERE}:small"}
    config = tiny_config(tmp_path, rounds=1, global_model="cnn", min_fraction=0.0)
    run_tiny(config, app=Wrapped(greedy), node_configs=[node | named for node in nodes])
    assert [row["num_accepted"] for row in rows(config)] == [0]


@pytest.mark.parametrize(("key", "most"), [("local-epochs", 50), ("batch-size", 1024)])
def test_work_has_a_cap_that_the_participant_sets(key: str, most: int) -> None:
    ask({key: most}, OWN)
    with pytest.raises(ConfigError, match=rf"client a: .*{key} = {most + 1}; .*max-{key} = {most}"):
        ask({key: most + 1}, OWN)
    ask({key: most + 1}, OWN | {f"max-{key}": most + 1})
    with pytest.raises(ConfigError, match=rf"max-{key} = 2"):
        ask({key: 3}, OWN | {f"max-{key}": 2})
    ask({key: most + 1}, {"partition-id": 0})


def test_what_a_server_may_say_is_a_closed_list() -> None:
    """Everything else of its run config is as if it were not there."""
    known = RunConfig.key_names()
    assert known >= ASKED | DIVIDED
    told = {"chunk-size": 7, "clip-to-median": 0.0, "max-client-examples": 2, "learning-rate": 0.5}
    found = ask(told, OWN).run.flat()
    default = RunConfig().flat()
    assert found["learning-rate"] == 0.5
    assert {key for key, value in found.items() if value != default[key]} == {
        "learning-rate",
        "partition",
    }


def test_which_examples_are_whose_is_the_participants_affair() -> None:
    """Else a server could cut a participant's examples to one, by way of a partition."""
    asked = {"partition": "dirichlet", "num-partitions": 900, "dirichlet-alpha": 0.001}
    assert ask(asked, OWN).client.partition == "none"
    assert ask(asked, OWN | {"partition-id": 3}).client.num_partitions == 900
    assert ask(asked, OWN | {"partition-id": 3, "num-partitions": 4}).client.num_partitions == 4


@pytest.mark.parametrize(("key", "least", "more"), [("image-size", 256, 257)])
def test_some_of_it_is_bounded(key: str, least: float, more: float) -> None:
    ask({key: least}, OWN)
    with pytest.raises(ConfigError, match=rf"{key} = {more}; beyond {least} .*own file"):
        ask({key: more}, OWN)
    ask({key: more}, OWN | {key: more})


def test_old_versions_are_kept_for_so_many_rounds(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, checkpoint_every=1000, validation_fraction=0.1)
    items = tuple(config.flat().items())
    context = Context(
        run_id=1, node_id=1, state=RecordDict(), run_config=dict(items),
        node_config={**OWN, **trusting(tmp_path, f"{HERE}:small"), "state-dir": str(tmp_path)},
    )  # fmt: skip
    assert Participant.open(context).keeps_rounds == MOST_VERSIONS


def test_batches_count_as_passes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """pfedhn-batches is another word for epochs."""
    own = {"client-id": "a", "partition-id": 0, **trusting(tmp_path, f"{HERE}:small")}
    config = tiny_config(
        tmp_path, method="pfedhn", models=f"{HERE}:small", pfedhn_batches=1000, rounds=1
    )
    with pytest.raises(RunError):
        run_tiny(config, node_configs=[own])
    assert "asks for local-epochs = 267" in caplog.text


@pytest.mark.parametrize(
    ("size", "batch", "own", "most"),
    [
        (256, 1024, {}, 64),
        (256, 64, {}, None),
        (32, 1024, {}, None),
        (256, 1024, {"max-batch-size": 1024}, None),
        (32, 1024, {"image-size": 512}, 16),
        (256, 1024, {"batch-size": 128}, None),
    ],
)
def test_a_batch_has_so_many_pixels(
    size: int, batch: int, own: dict[str, int], most: int | None
) -> None:
    """Within either bound a network may need hundreds of gigabytes for a step."""
    run = RunConfig().with_overrides({"image-size": size, "batch-size": batch}).flat()
    node = {"client-id": "a", **own}
    if most is None:
        declared((*run.items(),), (*node.items(),))
        return
    with pytest.raises(ConfigError, match=f"batch-size = {batch}; .* max-batch-size = {most}"):
        declared((*run.items(),), (*node.items(),))
