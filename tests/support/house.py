"""What the tests of the architecture look at: imports, storeys, and which files a call passes."""

import ast
import sys
from collections.abc import Callable, Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("server_app", "client_app", "common", "experiments")
APPS = ("server_app", "client_app", "common")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    """Return a file's path as the tests print it."""
    return path.relative_to(ROOT).as_posix()


def imported(path: Path, *, inside_functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield a file's imports; those under TYPE_CHECKING count too."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield node
            elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                waiting.append(node)


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in imported(path, inside_functions=True):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
    return found


def import_graph(package: str) -> dict[str, set[str]]:
    """Return for each module of a package the modules of the package that it imports at the top."""
    modules = {}
    for path in sources(package):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for module, path in modules.items():
        found = set()
        for node in imported(path, inside_functions=False):
            for alias in node.names:
                if isinstance(node, ast.Import):
                    found.add(alias.name)
                else:
                    whole = f"{node.module}.{alias.name}"
                    found.add(whole if whole in modules else str(node.module))
        graph[module] = (found & modules.keys()) - {module}
    return graph


def tallest(graph: dict[str, set[str]]) -> list[str]:
    """Return the longest chain of imports; `graphlib.CycleError` names a circle."""
    chains: dict[str, list[str]] = {}
    for module in TopologicalSorter(graph).static_order():
        below = max((chains[other] for other in sorted(graph[module])), key=len, default=[])
        chains[module] = [module, *below]
    return max(chains.values(), key=len)


class Trace:
    """Which functions of the apps are called in this thread while the context is open."""

    def __init__(self) -> None:
        self._codes: set[CodeType] = set()

    def __enter__(self) -> "Trace":
        sys.setprofile(self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self._codes.add(frame.f_code)

    def functions(self) -> dict[str, set[str]]:
        """Return the names of the called functions by file of the apps."""
        found: dict[str, set[str]] = {}
        for code in self._codes:
            path = Path(code.co_filename)
            ours = path.is_relative_to(ROOT) and name_of(path).split("/")[0] in APPS
            if ours and code.co_name != "<module>":
                found.setdefault(name_of(path), set()).add(code.co_qualname)
        return found


def listed(files: Iterable[str]) -> str:
    """Return files, sorted, one a line, for the message of a failed test."""
    return "\n".join(sorted(files))


def traced(call: Callable[[], object]) -> dict[str, set[str]]:
    """Call, and return the functions of the apps that it passed, by file."""
    with Trace() as trace:
        call()
    return trace.functions()
