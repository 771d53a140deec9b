"""Who may import whom (CONTRIBUTING.md), read from the source: no module is run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = frozenset({"dualpipe", "model", "parallel", "training", "serving"})
MAY_IMPORT: dict[str, frozenset[str]] = {
    "dualpipe": frozenset(),
    "model": frozenset(),
    "parallel": frozenset({"dualpipe", "model"}),
    "training": frozenset({"dualpipe", "model", "parallel"}),
    "serving": frozenset({"dualpipe", "model", "parallel"}),
    "train.py": frozenset({"training"}),
}
ENGINE_MAY_IMPORT = sys.stdlib_module_names | {"torch"}
FOR_PICTURES = frozenset({"matplotlib"})  # the engine imports it only where it draws: it must run without


def imports(source: str, package: str) -> Iterator[tuple[str, bool]]:
    """(top-level package, is it imported as soon as the module is) for every import in a module of `package`."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield package if node.level else (node.module or "").split(".")[0], node in tree.body


def forbidden(source: str, package: str) -> set[str]:
    """The imports in `source` that a module of `package` may not make."""
    found = {(name, early) for name, early in imports(source, package) if name != package}
    wrong = {name for name, _ in found} & ((OURS - MAY_IMPORT[package]) | {"tests", "benchmarks"})
    if package == "dualpipe":
        outside = {(name, early) for name, early in found if name not in ENGINE_MAY_IMPORT}
        wrong |= {name for name, early in outside if early or name not in FOR_PICTURES}
    return wrong


def modules(package: str) -> list[Path]:
    path = ROOT / package
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    found = modules(package)
    assert found, f"{package} has no modules: was it moved?"
    wrong = {str(p.relative_to(ROOT)): names for p in found if (names := forbidden(p.read_text(), package))}
    assert not wrong, f"may not be imported there (CONTRIBUTING.md): {wrong}"


@pytest.mark.parametrize(
    ("source", "package", "wrong"),
    [
        ("import model.config", "dualpipe", {"model"}),
        ("def f():\n    from parallel.mesh import Mesh", "model", {"parallel"}),
        ("import numpy", "dualpipe", {"numpy"}),
        ("import matplotlib", "dualpipe", {"matplotlib"}),
        ("def draw():\n    from matplotlib.figure import Figure", "dualpipe", set()),
        ("import numpy", "model", set()),
        ("from training.step import train_step", "parallel", {"training"}),
        ("from dualpipe.schedule import Kind\nfrom . import mesh", "parallel", set()),
        ("import dualpipe, parallel", "train.py", {"dualpipe", "parallel"}),
        ("from tests.oracle import Oracle", "training", {"tests"}),
        ("from serving.engine import Engine", "training", {"serving"}),
        ("from training.checkpoint import load", "serving", {"training"}),
        ("import torch, os, dualpipe.stage", "dualpipe", set()),
    ],
)
def test_the_check_sees_what_it_should(source: str, package: str, wrong: set[str]) -> None:
    assert forbidden(source, package) == wrong


def test_train_py_stays_an_entry_point() -> None:
    assert len((ROOT / "train.py").read_text().splitlines()) < 80
