"""The site of the documents: built as a user builds it, without a dead link, from local files."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from common.config import RunConfig

ROOT = Path(__file__).parents[1]
FETCHED = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//[^>]*>")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`--strict`: a warning, such as of a dead link or anchor, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_nothing_is_fetched_when_a_page_is_looked_at(site: Path) -> None:
    found = {page.name: FETCHED.findall(page.read_text()) for page in site.rglob("*.html")}
    assert not {name: tags for name, tags in found.items() if tags}


def test_every_link_of_the_built_site_leads_somewhere(site: Path) -> None:
    dead = []
    for page in site.rglob("*.html"):
        links = Links()
        links.feed(page.read_text())
        for target in links.found:
            if page.name != "404.html" and not (page.parent / target).exists():
                dead.append((page.name, target))
    assert not dead


def test_settings_and_modules_are_there(site: Path) -> None:
    settings = (site / "settings.html").read_text()
    missing = [key for key in RunConfig.key_names() if f"<code>{key}</code>" not in settings]
    assert not missing
    names = {"server": "server_app.aggregation.base.Rule.move", "client": "client_app.methods.base"}
    for page, name in names.items():
        assert f'id="{name}"' in (site / "api" / f"{page}.html").read_text()


class Links(HTMLParser):
    """Where a page links to, within the site."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href" if tag in ("a", "link") else "src")
        if target and "://" not in target and (path := target.partition("#")[0]):
            self.found.add(path.partition("?")[0])
