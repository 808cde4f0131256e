"""What mkdocs.yml cannot say: pages beside docs/, what pages link to, settings, attributes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BESIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(?<=\]\()[^)#\s:]+(?=[)#])")
MODULE = re.compile(r"^::: ([\w.]+)$", re.M)
TITLE = re.compile(r"# --- (.+) ---")
ATTRIBUTE = re.compile(r"^([a-z]\w*(?:, \w+)*) : (?=\S)", re.M)
ESCAPED = re.compile(r"[|<_*]")
SETTING = re.compile(r"([a-z-]+) = (.+?)\s+# (.+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages beside docs/, and every file outside docs/ that a page links to."""
    pages = [*(ROOT / name for name in BESIDE), *DOCS.rglob("*.md")]
    linked = (page.parent / m.group() for page in pages for m in LINK.finditer(page.read_text()))
    for path in {*pages[: len(BESIDE)], *(path.resolve() for path in linked)}:
        if path.is_file() and not path.is_relative_to(DOCS):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where a file is on the site: there docs/ and what is beside it are one folder.

    Modules get their whole name in the table of contents, the page of settings its tables.
    """
    source, uri = Path(str(page.file.abs_src_path)), Path(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = (source.parent / match.group()).resolve()
        if not target.is_file():
            return match.group()  # for MkDocs to complain about
        place = target.relative_to(DOCS if target.is_relative_to(DOCS) else ROOT)
        return Path(os.path.relpath(place, uri.parent)).as_posix()

    if uri.name == "README.md":
        page.meta["hide"] = ["navigation"]  # which has nothing to say there
    elif uri.name == "settings.md":
        markdown += "\n".join(settings())
    markdown = MODULE.sub(r"\g<0>\n    options: {toc_label: \1}\n", markdown)
    return LINK.sub(moved, markdown)


def settings() -> Iterator[str]:
    """Yield pyproject.toml's table of settings as Markdown, line by line."""
    table = (ROOT / "pyproject.toml").read_text().partition("[tool.flwr.app.config]\n")[2]
    for line in table.splitlines():
        if title := TITLE.fullmatch(line):
            heading = title[1][0].upper() + title[1][1:]
            yield f"\n## {heading}\n\n| key | default | meaning |\n|---|---|---|"
        elif setting := SETTING.fullmatch(line):
            name, value, meaning = setting.groups()
            meaning = ESCAPED.sub(r"\\\g<0>", meaning)
            yield f"| `{name}` | `{value}` | {meaning} |"


class Attributes(griffe.Extension):
    """Reads "name : meaning", as docstrings here have it, where numpy style has the type."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Put the meaning of each attribute on a line of its own."""
        if obj.docstring and "\nAttributes\n---" in obj.docstring.value:
            obj.docstring.value = ATTRIBUTE.sub(r"\1\n    ", obj.docstring.value)
