"""A deployment on one machine: a real SuperLink and real SuperNodes, as processes.

For measurements of what separate machines would run. Loopback and without TLS: never a template
for a real federation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.config import RunConfig
from common.config.keys import to_toml
from experiments.run.engines import processes
from experiments.run.engines.superlink import SuperLink


class Deployment(SuperLink):
    """A context with a SuperLink to which nodes can be added; leaving it stops all."""

    def start_node(self, name: str, node_config: Mapping[str, Any]) -> None:
        """Start a SuperNode with a FLWR_HOME of its own; it waits for its SuperLink."""
        folder = self.home / name
        folder.mkdir()
        (folder / "node.toml").write_text(to_toml(node_config), encoding="utf-8")
        words = ["--insecure", "--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1"]
        words += ["--port", str(processes.free_port()), "--node-config", str(folder / "node.toml")]
        env = {"FLWR_HOME": str(folder)}
        self.start("flower-supernode", *words, log=folder / "node.log", env=env)

    def run(self, config: RunConfig) -> None:
        """Run to the end; raise RunError when the run did not complete."""
        self.complete(config)
