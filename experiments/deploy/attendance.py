"""What the operator of a run would like to know of its participants: `mh-pfedhn status RUN`."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from common.errors import DataError
from common.files import MOST_ROWS, read_file, read_json, read_rows

ATTENDANCE = "attendance.json"
MEASURED = ("accuracy", "accuracy_own", "accuracy_common", "accuracy_alone")


def run_status(run: Path) -> dict[str, Any]:
    """Return how far a run is, a row for every participant, and who was refused and why.

    Raises DataError where a file of the run cannot be read.
    """
    try:
        attendance = read_json(run / ATTENDANCE)
        clients, rows = run / "clients.csv", read_rows(run / "metrics.jsonl")
        summary = read_json(run / "summary.json")
        text = read_file(clients, MOST_ROWS).decode() if clients.exists() else ""
    except (OSError, ValueError) as error:
        raise DataError(f"{run} holds no run that can be read: {error}") from error
    tested = {row["client_id"]: row for row in csv.DictReader(io.StringIO(text))}
    if not attendance:
        attendance = {"time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "round": 0}
        attendance |= {"participants": [], "refused": [summary["reason"]] * bool(summary["reason"])}
    then = datetime.fromisoformat(attendance["time"].replace("Z", "+00:00"))
    scored = [row for row in rows if "accuracy_micro" in row]
    return {
        "run": str(run),
        "status": summary["status"],
        "round": attendance["round"],
        "seconds_since": (datetime.now(UTC) - then).total_seconds(),
        "accuracy": scored[-1]["accuracy_micro"] if scored else None,
        "participants": [
            {**tested.get(p["client_id"], {}), **p} for p in attendance["participants"]
        ],
        "refused": attendance["refused"],
    }


def drawn_run(status: dict[str, Any]) -> RenderableType:
    """Draw a run's status: a line, a row for every participant, the refusals."""
    done = f"  {status['status']}, round {status['round']}, "
    head = Text.assemble((Path(status["run"]).name, "bold"), done)
    head.append(f"{status['seconds_since']:.0f} s ago")
    if status["accuracy"] is not None:
        head.append(f", accuracy {status['accuracy']:.3f}")
    names = [n for n in MEASURED if any(row.get(n) for row in status["participants"])]
    titles = [n.removeprefix("accuracy_") for n in names]
    table = Table("participant", "online", "last reply", "parameters", *titles, "gain", "rejected")
    for row in status["participants"]:
        online = Text("yes", "green") if row["online"] else Text("no", "red")
        cells = [f"{float(row[n]):.3f}" if row.get(n) else "" for n in names]
        gain = f"{100 * float(row['gain']):+.1f}" if row.get("gain") else ""
        reply = "none yet" if row["last_reply"] is None else f"round {row['last_reply']}"
        facts = [row.get("num_parameters", ""), *cells, gain, row.get("rejected", "")]
        table.add_row(row["client_id"], online, reply, *facts)
    refused = [Text(f"refused: {reason}", "yellow") for reason in status["refused"]]
    return Group(head, table, *refused)
