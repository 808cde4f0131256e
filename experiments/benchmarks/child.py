"""Measurements that need a process of their own, for its peak memory and a clean start."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def measure_in_child(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `python -m module arguments`; return the JSON object that its last line prints.

    A process that fails gives a row that says so: `skipped` with its last words, `failed`, and the
    end of what it wrote as `traceback`.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        reason = f"the process ended with {done.returncode}: {last}"
        return {"skipped": reason, "failed": True, "traceback": done.stderr[-4000:]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row
