"""The page: complete, self-contained, and honest about runs that did not end well."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest

from experiments.__main__ import main
from tests.unit.experiments.run_folders import DATA, write_seed
from tests.unit.experiments.test_study import write_checkpoint


def report(root: Path) -> str:
    """The page of a folder of runs."""
    assert main(["report", str(root)]) == 0
    return (root / "report.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A study with everything: Local, two methods, a failed and a cut run, a broken folder."""
    root = tmp_path_factory.mktemp("study")
    data = {**DATA, "cache_dir": str(root / ".cache")}
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
    found = report(root)
    assert "seed 3: failed after round 0 of 2" in (root / "report.md").read_text()
    return found


def test_the_page_loads_nothing(page: str) -> None:
    loads = r"""\s(?:src|(?:xlink:)?href|srcset|data|poster|action)\s*=\s*["']?([^"'\s>]*)"""
    assert all(value.startswith("#") for value in re.findall(loads, page))
    assert not re.search(r"<(script|link|iframe|img|object|embed|image)\b", page)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "http" not in page


def test_figures_follow_light_and_dark_and_state_their_command(page: str) -> None:
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) == 3 + 1 + 2
    for figure in figures:
        assert "<svg" in figure
        assert "var(--ink)" in figure
        assert "#22272e" not in figure, "a colour that would not follow the page"
    assert len(re.findall(r"Made by .*<code>mh-pfedhn report [^<]+</code>", page)) == 3


def test_the_page_says_what_came_out(page: str) -> None:
    text = text_of(page)
    assert "Highest micro accuracy in the last round: MH-pFedHN, 75.0 ± 5.0 % (2 seeds)." in text
    assert "Every client alone (Local): 50.0 % (2 seeds)." in text
    assert "Mean cosine of two clients' directions" in text
    assert "no traffic" in text
    assert (
        "Tested is the model that the server sends, before local training (MH-pFedHN, "
        "MH-pFedHNGD); the client's own model, after local training (Local). Bands:"
    ) in text
    for word in ("other predictor", "alone:", "common:"):
        assert word not in text


def test_unfinished_runs_are_named_and_in_no_mean(page: str) -> None:
    text = text_of(page)
    assert "Not in any mean below" in text
    assert "MH-pFedHNGD, seed 1: interrupted after round 2 of 9" in text
    assert "MH-pFedHN, seed 3: failed after round 0 of 2" in text
    assert "&lt;no&gt; client came" in page
    assert "<no>" not in page
    assert "JSONDecodeError" in text
    assert "<title>MH-pFedHNGD, seed 1: interrupted after round 2 of 9; last 30.0 %</title>" in page


def test_second_predictors_are_in_both_tables(tmp_path: Path) -> None:
    for seed, head in ((1, 0.7), (2, 0.8)):
        write_seed(tmp_path / f"p{seed}", method="fedproto", seed=seed, evaluation="fused",
                   row={"accuracy_head": head})  # fmt: skip
    write_seed(tmp_path / "t", method="fedavg-ft", row={"accuracy_global": 0.3})
    write_seed(tmp_path / "a", method="fedavg")
    page = report(tmp_path)
    table = (tmp_path / "report.md").read_text()
    assert "<th>other predictor</th>" in re.sub(r" title=.*?>", ">", page)
    assert '<td>head 75.0 <span class="se">± 5.0</span></td>' in page
    assert "<td>global 30.0</td>" in page
    assert "| FedProto | 40.0 | head 75.0 ± 5.0 | 38.0 |" in table
    assert "| FedAvg | 40.0 | - | 38.0 |" in table
    assert "by the nearest prototype that the server sends (FedProto)" in page
    assert 'Runs with evaluation = "fused" are tested when a round begins' in text_of(page)


def test_own_common_alone_and_gain_have_columns_of_their_own(tmp_path: Path) -> None:
    others = {"accuracy_own": 0.35, "accuracy_common": 0.3, "accuracy_alone": 0.2}
    write_seed(tmp_path / "p", row=others, alone=(0.3,) * 4)
    write_seed(tmp_path / "a", method="fedavg")
    page = text_of(report(tmp_path))
    table = (tmp_path / "report.md").read_text()
    assert "| method / variant | micro | own | common | alone | gain | macro |" in table
    assert "| MH-pFedHN | 40.0 | 35.0 | 30.0 | 20.0 | +35.0 | 38.0 |" in table
    assert "| FedAvg | 40.0 | - | - | - | - | 38.0 |" in table
    assert "+35.0; 4 of 4 better" in page


def test_compare_prints_a_table_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(write_seed(tmp_path / str(s), seed=s, accuracies=(0.1, 0.1 * s))) for s in (2, 4)]
    local = write_seed(tmp_path / "l", method="local", row={"bytes_up": 0, "bytes_down": 0})
    for words in ([], ["--bytes", "up"]):
        target = tmp_path / f"out{len(words)}.png"
        assert main(["compare", *runs, str(local), "--output", str(target), *words]) == 0
        assert "30.0 ± 10.0" in capsys.readouterr().out
        assert target.stat().st_size > 20_000
