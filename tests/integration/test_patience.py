"""`patience`: a run ends when validation has not improved for so many rounds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.config import RunSection
from common.errors import ConfigError
from common.messages import Evaluation
from server_app.output.run_folder import summarise
from server_app.scheduler import last_round
from tests.support.outputs import checkpoints, client_rows, rows, summary
from tests.support.tiny import run_tiny, tiny_config


def found(*accuracies: float | None) -> list[dict[str, Any]]:
    """Rows from round 1 on; None: not evaluated in that round."""
    return [
        {"round": number} | ({} if accuracy is None else {"validation_midmean": accuracy})
        for number, accuracy in enumerate(accuracies, 1)
    ]


@pytest.mark.parametrize(
    ("accuracies", "patience", "last"),
    [
        ([0.5, 0.4, 0.3], 0, 9),
        ([0.5, 0.4, 0.3], 3, 9),
        ([0.5, 0.4, 0.3, 0.2], 3, 5),
        ([0.5, 0.5, 0.5, 0.5], 3, 5),
        ([0.5, 0.4, 0.6, 0.2, 0.5], 3, 9),
        ([None, 0.4, None, None], 2, 5),
        ([None, None, None, None], 1, 9),
        ([0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1], 7, 9),
        ([0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1], 7, 9),
    ],
)
def test_the_round_after_waiting_is_the_last(
    accuracies: list[float | None], patience: int, last: int
) -> None:
    section = RunSection(rounds=9, patience=patience)
    assert last_round(section, found(*accuracies)) == last


def test_no_single_ones_claim_ends_a_run() -> None:
    """It has all right in round 1, nothing afterwards, and as many examples as it may."""

    def row(number: int) -> dict[str, Any]:
        seen = {
            f"site-{i}": Evaluation(
                num_test=100, num_correct=1, test_loss=1.0, seconds=1.0,
                num_validation=20, num_validated=20 * (0.3 + 0.006 * number),
            )
            for i in range(9)
        }  # fmt: skip
        claim = 200.0 if number == 1 else 0.0
        seen["liar"] = replace(seen["site-0"], num_validation=200, num_validated=claim)
        return {"round": number, **summarise(seen)}

    rows, section = [row(number) for number in range(1, 60)], RunSection(rounds=99, patience=10)
    assert all(last_round(section, rows[:count]) == 99 for count in range(1, len(rows)))


def test_where_few_tell_it_goes_on_to_the_end() -> None:
    """Of one to three that validate, nobody is left out of a middle half."""
    tells = Evaluation(num_test=100, num_correct=1, test_loss=1.0, seconds=1.0,
                       num_validation=20, num_validated=10)  # fmt: skip
    silent = replace(tells, num_validation=0, num_validated=0)
    for count in range(6):
        rows = {f"site-{i}": tells if i < count else silent for i in range(6)}
        assert ("validation_midmean" in summarise(rows)) == (count >= 4)


@pytest.mark.parametrize(
    "schedule",
    [
        {"max_in_flight": 1, "buffer_size": 1},
        {"max_in_flight": 4, "buffer_size": 2, "evaluation": "fused"},
    ],
)
def test_a_run_ends_whole(tmp_path: Path, schedule: dict[str, Any]) -> None:
    """These examples are learned within a few rounds of the sixty."""
    config = tiny_config(
        tmp_path, method="mh-pfedhn-pg", rounds=60, patience=3, validation_fraction=0.2,
        server_rule="kernel", learning_rate=0.2, **schedule,
    )  # fmt: skip
    run_tiny(config)
    metrics = rows(config)
    last = metrics[-1]["round"]
    validation = [row.get("validation_midmean", 0.0) for row in metrics]
    best = validation.index(max(validation)) + 1
    assert best + 3 < last < 60
    assert summary(config)["status"] == "completed"
    assert metrics[-1]["num_evaluated"] == len(client_rows(config)) == 6
    assert checkpoints(config)[-1].name.endswith(f"{last:08}")


def test_it_needs_examples_to_judge_by(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="patience = 3 with validation-fraction = 0"):
        tiny_config(tmp_path, patience=3)
