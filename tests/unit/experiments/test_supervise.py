"""The SuperNode that a join watches: why it ended, what the server refused, and runs that stop."""

import io
import json
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from experiments.deploy.settings import JoinSettings
from experiments.deploy.status import drawn, status_of
from experiments.deploy.supervise import Supervisor, explain
from tests.support.joining import settings


@pytest.mark.parametrize(
    ("lines", "code", "text"),
    [
        (["\x1b[91mERROR\x1b[0m: Exit Code: 305"], 305, "the server refused the connection"),
        (["Exit Code: 302", "Unable to parse"], 302, "the key cannot be used (exit code 302)"),
        (["Exit Code: 606"], 606, "install the same on both sides"),
        (["Exit Code: 777"], 777, "exit code 777"),
        (["first", "Killed", ""], 0, "Killed"),
        ([], 0, "no output"),
    ],
)
def test_why_a_supernode_ended(lines: list[str], code: int, text: str) -> None:
    found = explain(lines)
    assert found[0] == code
    assert text in found[1]


@pytest.mark.parametrize("final", [True, False])
def test_a_refusal_ends_it_at_once_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, final: bool
) -> None:
    """Unless it is of the kind that passes; then it is told, and goes on."""
    monkeypatch.setattr(JoinSettings, "command", lambda *_: ["sleep", "60"])
    own, console = settings(tmp_path), Console(record=True, width=200)
    own.folder.mkdir(parents=True)
    (own.folder / "refusal.json").write_text("{}")  # of an earlier time
    supervisor = Supervisor(own, console)
    told = json.dumps({"reason": "site-a declares 9 parameters [red]", "final": final})
    threading.Timer(0.5, (own.folder / "refusal.json").write_text, [told]).start()
    threading.Timer(4.0, supervisor._leave).start()
    started = time.monotonic()
    code = supervisor.run()
    text = console.export_text()
    assert "site-a declares 9 parameters [red]" in text
    assert (code, "refused by the server" in text) == ((1, True) if final else (0, False))
    assert (time.monotonic() - started < 3.5) == final
    shown = Console(record=True, width=200, file=io.StringIO())
    shown.print(drawn(status_of(own.folder)))
    assert "not joined  refused: site-a declares 9 parameters [red] (20" in shown.export_text()


SENT = """
import time
print("INFO : [RUN 77, ROUND 5, reply up to 1049608 bytes]")
print("INFO : Sending: train.personal message (ID: ab)")
print("INFO : Run ID 77 is not in `RUNNING` status. Ignoring reply message ab.", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("known", [False, True])
def test_a_run_that_stops_while_a_site_trains_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """By what its SuperNode says; what the server itself has said of a pause stays."""
    monkeypatch.setattr(JoinSettings, "command", lambda *_: [sys.executable, "-c", SENT])
    own = settings(tmp_path)
    own.folder.mkdir(parents=True)
    (own.folder / "federation.json").write_text('{"id": "fe"}')
    told = {"federation": "fe", "round": 3, "time": "then", "continued": False, "told": True}
    if known:
        (own.folder / "pause.json").write_text(json.dumps(told))
    supervisor = Supervisor(own, Console(file=io.StringIO()))
    threading.Timer(4.0, supervisor._leave).start()
    assert supervisor.run() == 0
    shown = Console(record=True, width=200, file=io.StringIO())
    shown.print(drawn(status_of(own.folder)))
    words = "paused after round 3 since then" if known else "stopped after round 4 since 20"
    assert words in shown.export_text()
