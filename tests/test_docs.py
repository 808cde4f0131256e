"""The documents say what is there: links, files, presets, keys and commands exist."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import NodeConfig, RunConfig
from experiments.__main__ import parser as build_parser
from experiments.run.presets import CONFIGS, EngineSection, preset_names

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PACKAGES = ("server_app", "client_app", "common", "experiments", "tests")
TREE = (*PACKAGES, "docs", "docker", ".ci")
STUDIES = {path.stem for path in (CONFIGS / "studies").glob("*.toml")}
LINE = 110
HISTORY = re.compile(
    r"\basked (was|were)\b|\(asked|\bissues? #?\d|\bsessions?\b|\bfor now\b|used to be", re.I
)
WRITTEN = {"report.md"}  # by a command
JOIN_KEYS = {"server", "certificate", "key", "client-id"}
FLOWER_KEYS = {"num-supernodes"}

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Return the numbered lines outside code fences."""
    fenced = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def subcommands() -> set[str]:
    parser = build_parser()
    (choices,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return set(choices.choices)


@documents
def test_lines_are_short(path: Path) -> None:
    long = [
        number
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > LINE and not line.lstrip().startswith("|")
    ]
    assert not long, f"{path.name}: lines {long} are longer than {LINE}"


@documents
def test_nothing_is_told_of_how_the_project_was_made(path: Path) -> None:
    found = [(n, m.group()) for n, line in prose(path) if (m := HISTORY.search(line))]
    assert not found, f"{path.name}: {found}"


@documents
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@documents
def test_files_that_are_named_exist(path: Path) -> None:
    # a line that names a revision may name what was there then
    for number, line in prose(path):
        for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.\w+)`", line):
            stands_for_a_name = Path(name).stem.isupper()  # NAME.py
            if name.split("/")[0] in TREE and not stands_for_a_name and "37a9310" not in line:
                assert (ROOT / name).exists(), f"{path.name}:{number}: {name}"


@documents
def test_commands_presets_and_keys_exist(path: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    commands = subcommands()
    for command in re.findall(r"mh-pfedhn ([a-z][a-z-]*)\b", text):
        assert command in commands, f"{path.name}: mh-pfedhn {command}"
    for name in re.findall(r"mh-pfedhn run ([\w-]+)(?!\S*\.toml)", text):
        assert name.isupper() or name in preset_names(), f"{path.name}: preset {name}"
    for name in re.findall(r"mh-pfedhn sweep ((?:study|evidence)-[\w-]+)", text):
        assert name in STUDIES, f"{path.name}: {name}"
    for module in re.findall(r"python -m ((?:experiments|common)[\w.]*)", text):
        file = ROOT / module.replace(".", "/")
        assert file.is_dir() or file.with_suffix(".py").is_file(), f"{path.name}: {module}"


@documents
def test_commands_have_the_words_they_are_given(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = build_parser()
    for fence in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
        for line in re.sub(r"\\\n\s*", " ", fence).splitlines():
            for words in re.findall(r"(?<![\w./-])mh-pfedhn ([^|&;)]*)", line.partition(" #")[0]):
                try:
                    parser.parse_args(shlex.split(words))
                except SystemExit:
                    pytest.fail(f"{path.name}: mh-pfedhn {words}: {capsys.readouterr().err}")


@documents
def test_settings_exist(path: Path) -> None:
    known = RunConfig.key_names() | EngineSection.key_names() | NodeConfig.key_names()
    known |= JOIN_KEYS | FLOWER_KEYS
    text = path.read_text(encoding="utf-8")
    keys = re.findall(r"`([a-z]+(?:-[a-z]+)+) = ", text)
    keys += re.findall(r"(?<![\w-])([a-z]+(?:-[a-z]+)+)=[\w\"]", text)
    unknown = set(keys) - known
    assert not unknown, f"{path.name}: {sorted(unknown)}"


def test_documents_that_the_code_cites_are_there() -> None:
    missing = set()
    for path in (p for top in PACKAGES for p in (ROOT / top).rglob("*") if p.suffix in CITING):
        for name in re.findall(r"[\w./-]+\.md\b", path.read_text(encoding="utf-8")):
            cited = Path(name).name
            if cited not in WRITTEN and not any(d.name == cited for d in DOCUMENTS):
                missing.add((str(path.relative_to(ROOT)), name))
    assert not missing


CITING = {".py", ".toml"}
