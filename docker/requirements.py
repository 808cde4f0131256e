"""Print what a deployed federation needs of pyproject.toml's dependencies, one a line.

Left out: torch (a layer of its own), and what only simulation and tests use (Ray, torchvision).
"""

import sys
import tomllib
from pathlib import Path

LEFT_OUT = ("torch", "torchvision", "ray")

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["privacy"]:
    name = requirement.split("[")[0].split("=")[0].split(">")[0].split("<")[0].strip()
    if name not in LEFT_OUT:
        print(requirement.replace("[simulation]", ""))
