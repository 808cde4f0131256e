"""What there is to know of every key: the table of `mh-pfedhn keys`, pyproject's, a JSON schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.config.run_config import TITLES, RunConfig
from common.config.section import Scalar, Section

BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class Key:
    """One key; `kind` is its type or choices and its bounds, in words."""

    name: str
    section: str
    default: Scalar | None
    kind: str
    unit: str
    where: str
    meaning: str


def describe(section: type[Section], title: str) -> list[Key]:
    """Return the keys of a section in their order."""
    facts = section.model_json_schema()["properties"]
    return [
        Key(name, title, p.get("default"), _kind(p), p["unit"], p["where"], p["description"])
        for name, p in facts.items()
    ]


def run_keys() -> list[Key]:
    """Return every key of the run config, section by section."""
    return [k for name, s in RunConfig.sections().items() for k in describe(s, TITLES[name])]


def json_schema() -> dict[str, Any]:
    """Return a JSON schema of an experiment file's `[config]` table, for editors."""
    sections = [section.model_json_schema() for section in RunConfig.sections().values()]
    properties = {name: p for section in sections for name, p in section["properties"].items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "MH-pFedHN run config",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def config_table() -> str:
    """Return the defaults as the `[tool.flwr.app.config]` table of a pyproject.toml, commented."""
    lines, section = ["[tool.flwr.app.config]"], ""
    for one in run_keys():
        if one.section != section:
            section = one.section
            lines.append(f"# --- {section} ---")
        where = f"{one.where}: " if one.where else ""
        setting = f"{one.name} = {toml_value(one.default)}"
        lines.append(f"{setting:<30} # {where}{one.meaning}")
    return "\n".join(lines) + "\n"


def to_toml(flat: Mapping[str, Scalar]) -> str:
    """Write flat keys as TOML, in the form that `flwr run --run-config FILE.toml` reads.

    >>> print(to_toml({"rounds": 3, "data-dir": "/data", "fused": True}), end="")
    rounds = 3
    data-dir = "/data"
    fused = true
    """
    return "".join(f"{name} = {toml_value(value)}\n" for name, value in flat.items())


def toml_value(value: Scalar | None) -> str:
    """Write one scalar as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return repr(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'


def _kind(facts: Mapping[str, Any]) -> str:
    facts = next((f for f in facts.get("anyOf", ()) if f.get("type") != "null"), facts)
    if "enum" in facts:
        return " | ".join(map(str, facts["enum"]))
    bounds = " and ".join(f"{sign} {facts[b]:g}" for b, sign in BOUNDS.items() if b in facts)
    return f"{facts['type']} {bounds}".strip()
