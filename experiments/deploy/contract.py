"""`mh-pfedhn contract`: what all participants of a federation agree on, in one file.

The operator writes it, `certs --contract` puts it into every participant's folder, `join --check`
holds a participant's data against it, and `contract run` turns it into the keys of a run. What it
says of data and of what may be asked wins over any run config, for it is part of the node config.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from common.config import NodeConfig
from common.config.client import ClassNames, Intensity
from common.config.keys import describe, toml_value
from common.config.node import MOST_ASKED
from common.config.section import Section, key
from common.errors import ConfigError, DataError, listing
from common.files import printable, replace_file
from experiments.run.presets import read_toml

if TYPE_CHECKING:
    from client_app.data.examples import ClientData

CONTRACT = "federation.toml"
PICTURES = "pictures"
DARK, LIGHT = 85, 170
"""Of 255: up to the one a background is surely dark, from the other on surely light."""
MOST_OUTSIDE = 0.95
"""Of all values: what is cut off at the ends of the range that is agreed on."""


class Contract(Section):
    """The agreement of a federation's participants."""

    name: str = key("my-federation", "of the federation")
    server: str = key("", "HOST:PORT at which participants reach it")
    class_names: ClassNames = key(
        "", "names of all classes in their order, separated by commas; a site may lack some"
    )
    target: Literal["classes", "labels", "numbers"] = key(
        "classes", "what is predicted: one class, several labels (each there or not), or numbers"
    )
    outputs: int = key(
        0, "how many labels or numbers, where class-names has no names; 0: any", ge=0
    )
    input: str = key(
        PICTURES, '"pictures", or type and shape of one example: "float32 30", "int64 40"'
    )
    channels: Literal[1, 3] = key(3, "to which all pictures are brought: 1 grey, 3 RGB")
    intensity: Intensity = key(
        "",
        'what becomes 0 and what 255 of all pictures, as "0..4095"; a site whose values lie '
        "elsewhere, or that inverts them, sets its own; empty: as each site has it",
    )
    background: Literal["", "dark", "light"] = key(
        "", "what lies behind the things in all pictures; empty: whatever it is"
    )
    image_size: int = key(32, "to which pictures are scaled", unit="pixels a side", ge=8, le=2048)
    global_model: str = key("auto", "the common model: a built-in one, or auto: by the input")
    least_examples: int = key(2, "to train on, at each site", ge=2)
    max_local_epochs: int = key(50, "the most that a run may ask of a site", ge=1)
    max_batch_size: int = key(1024, "the most that a run may ask of a site", ge=1)

    @model_validator(mode="after")
    def _is_usable(self) -> Self:
        if ":" in self.global_model:
            raise ValueError("global-model must be a built-in one: sites run their own code alone")
        if self.input != PICTURES:
            self.shape  # noqa: B018 - raises
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a contract; raise ConfigError where it cannot be used."""
        return cls.checked(read_toml(path), str(path))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example that is no picture."""
        dtype, _, shape = self.input.partition(" ")
        if dtype not in ("float32", "int64") or not shape.replace("x", "").isdigit():
            raise ValueError(f'input = {self.input!r} must be "pictures" or as "float32 3x40"')
        return tuple(int(size) for size in shape.split("x"))

    def run_config(self) -> dict[str, Any]:
        """Return the keys that every run of this federation has."""
        names = {"class-names": self.class_names} if self.class_names else {}
        pictures = {"image-size": self.image_size, "channels": self.channels}
        return {
            **names,
            "global-model": self.global_model,
            **(pictures if self.input == PICTURES else {}),
        }

    def node_config(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return a participant's keys with those of the contract; its own caps and intensity win.

        Raises ConfigError where its file contradicts the contract.
        """
        for name, agreed in self.run_config().items():
            if name in own and own[name] != agreed:
                raise ConfigError(
                    f"join: {name} = {own[name]!r}, but the contract of {self.name} says "
                    f"{agreed!r}. Leave it out."
                )
        caps = {"max-local-epochs": self.max_local_epochs, "max-batch-size": self.max_batch_size}
        light = {"intensity": self.intensity} if self.intensity and self.input == PICTURES else {}
        return {**caps, **light, **self.run_config(), **own}

    def lifted(self, node: Mapping[str, Any]) -> str:
        """Say where it lets a run ask for more than a participant's file would, "" nowhere."""
        fields = NodeConfig.model_fields
        agreed = {
            "max-local-epochs": (self.max_local_epochs, fields["max_local_epochs"].default),
            "max-batch-size": (self.max_batch_size, fields["max_batch_size"].default),
            "image-size": (self.image_size, MOST_ASKED["image-size"]),
        }
        above = [
            f"{name} = {most:,}"
            for name, (most, usual) in agreed.items()
            if most > usual and node.get(name) == most
        ]
        return f"- it lets a run ask for more than usual: {listing(above)}" if above else ""

    def require_met(self, data: ClientData) -> str:
        """Say how a participant's data meet the contract; raise DataError where they do not."""
        kind = PICTURES if data.is_pictures else str(data.input_dtype).removeprefix("torch.")
        faults = []
        if self.input.partition(" ")[0] != kind:
            hint = " (floats that are pictures need intensity, their range, as '0..1')"
            hint *= self.input == PICTURES and len(data.input_shape) in (2, 3)
            faults.append(f"{self.input} are agreed on, here {kind}{hint}")
        elif not data.is_pictures and self.shape != data.input_shape:
            faults.append(f"examples of shape {self.shape} are agreed on, here {data.input_shape}")
        if self.target != data.target:
            faults.append(f"{self.target} are to be predicted, here {data.target}")
        if data.is_pictures:
            faults += self._faults_of_light(data)
        if self.outputs not in (0, data.num_classes):
            faults.append(f"{self.outputs} {self.target} are agreed on, here {data.num_classes}")
        if self.least_examples > data.num_train:
            faults.append(f"{self.least_examples} to train on are agreed on, here {data.num_train}")
        if faults:
            raise DataError(f"contract of {self.name}: {'; '.join(faults)}.")
        return f"of {printable(self.name)}, {data.num_classes} {self.target}, {self.input}"

    def _faults_of_light(self, data: ClientData) -> list[str]:
        """Say where pictures are not as dark, or as light, as is agreed on."""
        from client_app.data.colours import border, outside

        first, last = data.about.get("intensity", (0, 255))
        low, high = data.about.get("values", (0, 255))
        is_wider = low < min(first, last) or high > max(first, last)
        if self.intensity and is_wider and outside(data.train_images) > MOST_OUTSIDE:
            return [
                f"your values are {low:g} to {high:g}, and nearly all lie outside of intensity = "
                f'"{first:g}..{last:g}": set it to the range that they are meant in, in your own '
                "file"
            ]
        light = border(data.train_images)
        is_wrong = {"dark": light >= LIGHT, "light": light <= DARK}
        if not is_wrong.get(self.background):
            return []
        return [
            f"the median of your pictures' borders is {light:.0f} of 255, a "
            f"{'light' if light >= LIGHT else 'dark'} background, and a {self.background} one is "
            f'agreed on: set intensity = "{last:g}..{first:g}" in your own file, which inverts them'
        ]


def add_contract_parser(commands: Any) -> None:
    """Add `contract new|run` to the command line."""
    command = commands.add_parser("contract")
    actions = command.add_subparsers(title="actions", required=True, metavar="ACTION")
    new = actions.add_parser("new", help="write one, with every key explained")
    run = actions.add_parser("run", help="print the keys of a run, for flwr run --run-config")
    for action, act in ((new, write_contract), (run, print_run)):
        action.add_argument("file", type=Path, nargs="?", default=Path(CONTRACT), metavar="FILE")
        action.set_defaults(command=act)


def write_contract(args: argparse.Namespace) -> int:
    """Write a contract with all defaults, and what each key means."""
    if args.file.exists():
        raise ConfigError(f"{args.file} is there already.")
    lines = []
    for one in describe(Contract, "contract"):
        setting = f"{one.name} = {toml_value(one.default)}"
        lines.append(f"{setting:<30} # {one.meaning}\n")
    replace_file(args.file, "".join(lines))
    words = "edit it, then: mh-pfedhn certs DIR --host HOST --site NAME --contract"
    print(f"{args.file}: {words} {args.file}")
    return 0


def print_run(args: argparse.Namespace) -> int:
    """Print a contract's keys as `flwr run` takes them."""
    config = Contract.read(args.file).run_config()
    print(*(f"{name}={toml_value(value)}" for name, value in config.items()))
    return 0


def join_defaults(values: Mapping[str, Any]) -> tuple[dict[str, Any], Contract | None]:
    """Fill in what the folder that a participant got from its operator says (`bundle`).

    Certificate, key, the server's address and the contract; what the participant's own file has
    wins. Raises ConfigError where the folder lacks something.
    """
    folder = values.get("bundle")
    if not folder:
        return dict(values), None
    root, found = Path(folder), {k: v for k, v in values.items() if k != "bundle"}
    for name, file in (("certificate", "ca.crt"), ("key", "supernode")):
        if not (root / file).is_file() and name not in found:
            has = listing(sorted(p.name for p in root.iterdir())) if root.is_dir() else "nothing"
            raise ConfigError(f"join: bundle {root} lacks {file}; it has {has}. Ask the operator.")
        found.setdefault(name, str(root / file))
    if not (root / CONTRACT).is_file():
        return found, None
    contract = Contract.read(root / CONTRACT)
    if contract.server:
        found.setdefault("server", contract.server)
    return contract.node_config(found), contract
