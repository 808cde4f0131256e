"""What the commands have in common: where they print, and `--set`."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console


def make_console(*, wide: bool = False, markup: bool = True) -> Console:
    """Return the console of a command; rich would cut the lines of a file or pipe to 80 columns."""
    width = None if sys.stdout.isatty() else 170 if wide else 120
    return Console(width=width, markup=markup, emoji=markup)


def say(console: Console, text: str, *, style: str = "", end: str = "\n") -> None:
    """Print text as it stands: no markup in it, no colours of rich's choice, no line breaks.

    What a terminal would obey is left out: names and reasons come from others.
    """
    text = "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)
    console.print(text, style=style, end=end, markup=False, highlight=False, soft_wrap=True)


def add_set_option(command: argparse.ArgumentParser, purpose: str) -> None:
    """Add `--set KEY=VALUE ...` to a command; it may be given more than once."""
    command.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help=purpose
    )
