"""What a participant puts into its settings, and what the checks of `mh-pfedhn join` print."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.deploy import checks
from experiments.deploy.settings import JoinSettings

BASIC = {"client-id": "site-a", "server": "127.0.0.1:9", "insecure": True, "dataset": "digits"}


def settings(folder: Path, **changes: Any) -> JoinSettings:
    values = BASIC | {"state-dir": str(folder / "state")}
    return JoinSettings.parse(values | changes, folder)


def checked(found: JoinSettings, *, must_answer: bool = False) -> tuple[bool, str]:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    found.folder.mkdir(parents=True, exist_ok=True)
    good = checks.run_checks(found, console, must_answer=must_answer)
    console.file.close()
    return good, console.export_text()
