"""Flower's own `flwr-clientapp` with fewer imports; a participant's SuperNode finds it on its PATH.

Flower starts `flwr-clientapp` for every message. Its console script imports the package
`flwr.supernode.cli`, whose `__init__` also imports the whole SuperNode: SQLAlchemy, alembic and the
web server, about 0.8 s of CPU (Flower 1.41) that no message uses. Here that one `__init__` is
skipped; the command that runs is Flower's, unchanged. If Flower is laid out differently, its plain
command runs.
"""

from __future__ import annotations

import os
import shlex
import sys
import types
from pathlib import Path

NAME = "flwr-clientapp"
_PACKAGE = "flwr.supernode.cli"


def install_lean_clientapp(folder: Path) -> Path:
    """Write the program `flwr-clientapp` into folder/bin; returns that folder, for the PATH."""
    programs = folder / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    command = shlex.join([sys.executable, "-P", str(Path(__file__).resolve())])
    draft = programs / f".{NAME}"
    draft.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    draft.chmod(0o755)
    os.replace(draft, programs / NAME)
    return programs


def main() -> None:
    """Run Flower's command line for one message."""
    import flwr.supernode

    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(Path(path) / "cli") for path in flwr.supernode.__path__]
    sys.modules[_PACKAGE] = package
    try:
        from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    except ImportError:
        del sys.modules[_PACKAGE]
        from flwr.supernode.cli import flwr_clientapp
    flwr_clientapp()


if __name__ == "__main__":
    main()
