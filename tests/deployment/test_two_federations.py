"""Participants as they are, by the documented commands alone, on machines with a home each.

A folder of RGB pictures with a ResNet18 of which the last layer is trained, and grey pictures that
lack two classes, in one federation; tables with splits of their own in another. Each is killed in
the middle of its run, joins again, and evaluates the model that it owns.
"""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.deployment import wait_until
from tests.support.machines import PATIENCE_S, Operator, Site, minutes, stopping
from tests.support.sites import coloured, digits, write_folders, write_pretrained, write_table

ROUNDS = 12


def take_part(operator: Operator, sites: list[Site]) -> None:
    """Run a federation, in the middle of which each `join` is killed and typed again."""
    for site in sites:
        with minutes(f"{site.name}: join, until it is ready"):
            site.join()
            site.wait_for("join", "SuperNode ID")
    with minutes("the first round, with a model for everybody"):
        operator.begin(rounds=ROUNDS)
        wait_until(operator.rows, PATIENCE_S, "a round ends")
        for site in sites:
            assert site.status()["rounds"]
    for site in sites:
        with minutes(f"{site.name}: kill -9, and back"):
            site.kill("join")
            assert not site.status()["joined"]
            site.join()
            site.wait_for("join", "SuperNode ID", times=2)
            assert site.status()["joined"]
            before = len(operator.rows())
            wait_until(lambda n=before: len(operator.rows()) > n, PATIENCE_S, "a round ends")
    with minutes(f"the rest of {ROUNDS} rounds"):
        wait_until(lambda: len(operator.rows()) == ROUNDS, PATIENCE_S, "all rounds end")
        for site in sites:
            site.wait_for("join", "joining is worth")
            assert not site.status()["trouble"]
    assert "completed" in operator.run("mh-pfedhn status run")


def accuracy_of(site: Site, data: Path) -> float:
    """Return what `model evaluate` says of examples that nobody has seen."""
    with minutes(f"{site.name}: model evaluate"):
        said = site.run(f"mh-pfedhn model evaluate state/{site.name} {data} --code .")
    found = re.search(r"accuracy\D+([0-9.]+)", said)
    assert found, said
    return float(found[1])


@pytest.mark.slow  # three to six minutes
def test_pictures_in_colour_and_grey_ones_that_lack_classes(tmp_path: Path) -> None:
    operator = Operator(tmp_path / "operator")
    rgb, grey = Site(tmp_path / "radiology"), Site(tmp_path / "practice")
    rng = np.random.default_rng(1)
    with stopping(operator, rgb, grey):
        with minutes("contract, certificates, SuperLink, server, two keys"):
            names = ",".join(f"digit-{number}" for number in range(10))
            operator.make({"class-names": names}, ["radiology", "practice"])
        pictures, labels = digits(0, 300)
        write_folders(rgb.home / "pictures", coloured(pictures, rng), labels)
        write_pretrained(rgb.home)
        pictures, labels = digits(300, 600)
        write_folders(grey.home / "pictures", pictures, labels, most=8)
        for site, model in ((rgb, "radiology:frozen"), (grey, "cnn")):
            with minutes(f"{site.home.name}: its file, and join --check"):
                bundle = operator.home / "certs" / site.home.name
                lines = {"dataset": "folder", "data_dir": "pictures", "model": model}
                site.declare(site.home.name, bundle, **lines)
        take_part(operator, [rgb, grey])
        unseen, labels = digits(900, 1100)
        write_folders(tmp_path / "grey", unseen, labels, most=8)
        write_folders(tmp_path / "rgb", coloured(unseen, rng), labels)
        assert accuracy_of(rgb, tmp_path / "rgb") > 0.7
        assert accuracy_of(grey, tmp_path / "grey") > 0.7


@pytest.mark.slow  # three to six minutes
def test_tables_with_splits_of_their_own(tmp_path: Path) -> None:
    operator = Operator(tmp_path / "operator")
    sites = [Site(tmp_path / "clinic-a"), Site(tmp_path / "clinic-b")]
    with stopping(operator, *sites):
        contract = {"input": "float32 30", "class-names": "malignant,benign"}
        with minutes("contract, certificates, SuperLink, server, two keys"):
            operator.make(contract, [site.home.name for site in sites])
        for number, site in enumerate(sites):
            write_table(site.home, number, hidden=16 + 16 * number)
            with minutes(f"{site.home.name}: its file, and join --check"):
                bundle = operator.home / "certs" / site.home.name
                lines = {"dataset": "clinic:load_rows", "model": "clinic:mlp"}
                site.declare(site.home.name, bundle, **lines)
        take_part(operator, sites)
        for site in sites:
            site.run("python -c 'import clinic, numpy as np; x, y = clinic.load_rows()[\"test\"]; "
                     "np.savez(\"test.npz\", inputs=x, labels=y)'")  # fmt: skip
            assert accuracy_of(site, site.home / "test.npz") > 0.9
