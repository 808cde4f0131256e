"""`mh-pfedhn keys [KEY]`: every key with its default, range, unit, meaning and where it matters."""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.config import NodeConfig
from common.config.keys import Key, config_table, describe, json_schema, run_keys, toml_value
from common.errors import ConfigError, unknown_name
from experiments.console import make_console, say
from experiments.run.presets import EngineSection


def add_keys_parser(commands: Any) -> None:
    """Add `keys`."""
    command = commands.add_parser("keys")
    command.add_argument("key", nargs="?", metavar="KEY", help="this one alone")
    command.add_argument("--node", action="store_true", help="those of a participant's node config")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json-schema", action="store_true", help="for editors")
    form.add_argument("--toml", action="store_true", help="pyproject.toml's table of the defaults")
    command.set_defaults(command=run_keys_command)


def run_keys_command(args: argparse.Namespace) -> int:
    """Print what was asked for."""
    if args.json_schema:
        print(json.dumps(json_schema(), indent=2))
    elif args.toml:
        print(config_table(), end="")
    else:
        engine = describe(EngineSection, "[engine] of an experiment file")
        known = describe(NodeConfig, "node config") if args.node else [*run_keys(), *engine]
        if args.key is None:
            _print_all(make_console(), known)
        else:
            _print_one(make_console(), _find(args.key, known))
    return 0


def _find(name: str, known: list[Key]) -> Key:
    found = {key.name: key for key in known}
    name = name.replace("_", "-")
    if name not in found:
        raise ConfigError("keys: " + unknown_name("key", name, found))
    return found[name]


def _print_all(console: Console, known: list[Key]) -> None:
    for section, keys in groupby(known, key=lambda key: key.section):
        table = Table(title=escape(section), title_justify="left", box=None, pad_edge=False)
        for column in ("key", "default", "range", "meaning"):
            table.add_column(column, no_wrap=column == "key", overflow="fold")
        for key in keys:
            kind = f"{key.kind}, {key.unit}" if key.unit else key.kind
            meaning = f"{key.where}: {key.meaning}" if key.where else key.meaning
            table.add_row(*map(escape, (key.name, _default(key), kind, meaning)))
        console.print(table)
        console.print()


def _print_one(console: Console, key: Key) -> None:
    say(console, key.name, style="bold")
    facts = {
        "default": _default(key),
        "range": key.kind,
        "unit": key.unit,
        "section": key.section,
        "matters for": key.where or "every run",
    }
    say(console, f"  {key.meaning}")
    for label, text in facts.items():
        if text:
            say(console, f"  {label:<12} {text}")


def _default(key: Key) -> str:
    return "" if key.default is None else toml_value(key.default)
