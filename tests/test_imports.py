"""The architecture's arrows: server_app -> common <- client_app; flwr only where it is met."""

import ast

import pytest

from tests.support.house import APPS, PACKAGES, imported_modules, name_of, sources

ALLOWED = {
    "server_app": {"server_app", "common"},
    "client_app": {"client_app", "common"},
    "common": {"common"},
    "experiments": set(PACKAGES),
}
MEETS_FLOWER = {
    "server_app/app.py",
    "common/inflation.py",
    "server_app/transport.py",
    "client_app/app.py",
    "client_app/participant.py",
    "client_app/store.py",
    "common/records.py",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_point_the_right_way(package: str) -> None:
    for path in sources(package):
        tops = {name.split(".")[0] for name in imported_modules(path)} & set(PACKAGES)
        assert tops <= ALLOWED[package], f"{path} imports {tops - ALLOWED[package]}"


def test_flower_is_imported_only_where_it_is_met() -> None:
    found = {
        name_of(path)
        for package in APPS
        for path in sources(package)
        if "flwr" in {name.split(".")[0] for name in imported_modules(path)}
    }
    assert found <= MEETS_FLOWER


def test_nothing_is_deserialised_with_pickle() -> None:
    for package in PACKAGES:
        for path in sources(package):
            modules = {name.split(".")[0] for name in imported_modules(path)}
            assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                base = ast.unparse(node.func)
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if base == "torch.load":
                    assert keywords.get("weights_only") == "True", f"{path}: {base}"
                if base in {"np.load", "numpy.load"}:
                    assert keywords.get("allow_pickle") == "False", f"{path}: {base}"
