"""Arguments that several commands have."""

from __future__ import annotations

import argparse


def add_set_option(command: argparse.ArgumentParser, purpose: str) -> None:
    """Add `--set KEY=VALUE ...` to a command; it may be given more than once."""
    command.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help=purpose
    )
