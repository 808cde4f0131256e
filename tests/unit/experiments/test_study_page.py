"""The page: complete, self-contained, and honest about runs that did not end well."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from time import process_time
from typing import get_args

import pytest
from matplotlib.axes import Axes

from common.config.section import Method
from experiments.__main__ import main
from experiments.report import picture
from experiments.report.charts import Line
from experiments.report.curves import Axis
from experiments.report.predictors import TESTED
from tests.unit.experiments.run_folders import write_seed
from tests.unit.experiments.test_study import write_checkpoint

LOADS = {"src", "href", "srcset", "data", "poster", "action", "xlink:href"}
VOID = {"meta", "br", "circle", "line", "polygon", "rect"}


class Strict(HTMLParser):
    """Collects what a page would load, and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.figures = 0
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.loads += [str(value) for key, value in attrs if key in LOADS]
        self.figures += tag == "figure"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            if self.open and self.open[-1] == tag:
                self.open.pop()
            return
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A study with everything: Local, two methods, a failed and a cut run, a broken folder."""
    root = tmp_path_factory.mktemp("study")
    data = {
        "dataset": "tests.support.tiny:patterns", "image_size": 8, "partition": "iid",
        "cache_dir": str(root / ".cache"), "num_partitions": 4,
    }  # fmt: skip
    free = {"bytes_up": 0, "bytes_down": 0}
    for seed in (1, 2):
        for method, high in (("local", 0.5), ("mh-pfedhn", 0.6 + 0.1 * seed)):
            row = free if method == "local" else None
            folder = root / f"{method}-{seed}"
            write_seed(folder, method=method, seed=seed, accuracies=(0.1, high), row=row, **data)
    write_checkpoint(root / "mh-pfedhn-1")
    write_seed(root / "cut", method="mh-pfedhn-gd", seed=1, accuracies=(0.2, 0.3),
               status="interrupted", **(data | {"rounds": 9}))  # fmt: skip
    write_seed(root / "dead", seed=3, accuracies=(), status="failed", **(data | {"rounds": 2}))
    (write_seed(root / "broken") / "summary.json").write_text("{")
    assert main(["report", str(root)]) == 0
    assert "seed 3: failed after round 0 of 2" in (root / "report.md").read_text()
    return (root / "report.html").read_text(encoding="utf-8")


def test_the_page_loads_nothing(page: str) -> None:
    parser = Strict()
    parser.feed(page)
    assert parser.open == []
    assert parser.loads == []
    assert not {"script", "link", "iframe", "img", "object", "embed", "image"} & parser.seen
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "http" not in page


def test_every_figure_states_its_command(page: str) -> None:
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) == 3 + 1 + 2
    for figure in figures:
        assert "<svg" in figure
        assert re.search(r"<code>mh-pfedhn report [^<]+</code>", figure)


def test_the_page_says_what_came_out(page: str) -> None:
    text = re.sub(r"<[^>]+>", "", page)
    assert "Highest micro accuracy in the last round: MH-pFedHN, 75.0 ± 5.0 % (2 seeds)." in text
    assert "Every client alone (Local): 50.0 % (2 seeds)." in text
    assert "Mean cosine of two clients' directions" in text.replace("&#x27;", "'")
    assert "no traffic" in text


def test_the_page_says_which_model_is_tested(page: str) -> None:
    text = re.sub(r"<[^>]+>", "", page).replace("&#x27;", "'")
    assert (
        "Tested is the model that the server sends, before local training (MH-pFedHN, "
        "MH-pFedHNGD); the client's own model, after local training (Local). Bands:"
    ) in text
    assert "other predictor" not in text
    assert set(TESTED) == set(get_args(Method))


def test_second_predictors_are_in_both_tables(tmp_path: Path) -> None:
    for seed, head in ((1, 0.7), (2, 0.8)):
        write_seed(tmp_path / f"p{seed}", method="fedproto", seed=seed, evaluation="fused",
                   row={"accuracy_micro_head": head})  # fmt: skip
    write_seed(tmp_path / "t", method="fedavg-ft", row={"accuracy_micro_global": 0.3})
    write_seed(tmp_path / "a", method="fedavg")
    assert main(["report", str(tmp_path)]) == 0
    page, table = ((tmp_path / f"report.{end}").read_text() for end in ("html", "md"))
    assert "<th>other predictor</th>" in re.sub(r" title=.*?>", ">", page)
    assert '<td>head 75.0 <span class="se">± 5.0</span></td>' in page
    assert "<td>global 30.0</td>" in page
    assert "| FedProto | 40.0 | head 75.0 ± 5.0 | 38.0 |" in table
    assert "| FedAvg | 40.0 | - | 38.0 |" in table
    assert "(FedAvg + fine-tuning)" in page
    assert "by the nearest prototype that the server sends (FedProto)" in page
    assert "Runs with evaluation = &quot;fused&quot; are tested when a round begins" in page


def test_unfinished_runs_are_named_and_in_no_mean(page: str) -> None:
    text = re.sub(r"<[^>]+>", "", page)
    assert "Not in any mean below" in text
    assert "MH-pFedHNGD, seed 1: interrupted after round 2 of 9" in text
    assert "MH-pFedHN, seed 3: failed after round 0 of 2" in text
    assert "&lt;no&gt; client came" in page
    assert "<no>" not in page
    assert "JSONDecodeError" in text
    assert 'class="open' in page


def test_without_local_the_page_says_so(tmp_path: Path) -> None:
    write_seed(tmp_path / "a", dataset="folder")
    assert main(["report", str(tmp_path)]) == 0
    text = re.sub(r"<[^>]+>", "", (tmp_path / "report.html").read_text())
    assert 'No run of method = "local" with the same data, models and seed is here' in text
    assert "No completed run here has a hypernetwork, a checkpoint" in text


def test_compare_prints_a_table_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(write_seed(tmp_path / str(s), seed=s, accuracies=(0.1, 0.1 * s))) for s in (2, 4)]
    local = write_seed(tmp_path / "l", method="local", row={"bytes_up": 0, "bytes_down": 0})
    target = tmp_path / "out.png"
    assert main(["compare", *runs, str(local), "--output", str(target)]) == 0
    out = capsys.readouterr().out
    assert "30.0 ± 10.0" in out
    assert target.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("words", "title", "label", "end"),
    [([], "By traffic", "MB, up and down, all clients", 6.0),
     (["--bytes", "up"], "By traffic to the server", "MB, up, all clients", 2.0)],
)  # fmt: skip
def test_the_picture_is_by_both_ways_or_by_bytes_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], title: str, label: str,
    end: float,
) -> None:  # fmt: skip
    drawn: list[Axes] = []
    panel = picture._panel

    def noted(axes: Axes, lines: Sequence[Line], axis: Axis) -> None:
        panel(axes, lines, axis)
        drawn.append(axes)

    monkeypatch.setattr(picture, "_panel", noted)
    run = write_seed(tmp_path / "a")  # two rounds, each 1 MB up and 2 MB down
    assert main(["compare", str(run), "--output", str(tmp_path / "a.png"), *words]) == 0
    _, traffic, _ = drawn
    assert (traffic.get_title(loc="left"), traffic.get_xlabel()) == (title, label)
    assert traffic.get_lines()[0].get_xdata()[-1] == end


def test_a_report_of_20_runs_costs_less_than_10_seconds_of_cpu(tmp_path: Path) -> None:
    import client_app.data.examples  # noqa: F401 - torch takes seconds and is not what is timed

    data = {
        "dataset": "tests.support.tiny:patterns", "image_size": 8, "partition": "iid",
        "cache_dir": str(tmp_path / ".cache"), "num_partitions": 20,
    }  # fmt: skip
    for method in ("local", "mh-pfedhn", "fedavg", "fedproto"):
        for seed in range(5):
            folder = tmp_path / f"{method}-{seed}"
            write_seed(folder, method=method, seed=seed, accuracies=(0.1, 0.5) * 20,
                       clients=(0.5, 0.7) * 10, **data)  # fmt: skip
    for seed in range(5):
        write_checkpoint(tmp_path / f"mh-pfedhn-{seed}")
    started = process_time()
    assert main(["report", str(tmp_path)]) == 0
    assert process_time() - started < 10
    assert "20 runs, 20 completed" in (tmp_path / "report.html").read_text()
