"""Reads the signatures of a library's classes from its source, without importing it, into a table of plain facts.

DeepEP can be imported only on a machine with an NVIDIA GPU, so the tests hold our calls against a table that was made
from a checkout of it (`tests/deep_ep_signatures.json`: names, order, defaults; no code). To make it anew:

    python -m tests.signatures CHECKOUT deep_ep ElasticBuffer EPHandle >tests/deep_ep_signatures.json
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_package(package: Path, classes: Sequence[str]) -> dict[str, Any]:
    """{version, exports: names imported in __init__.py, classes: {name: {methods: {name: {...}}, attributes}}}.

    Raises ValueError for a class that is not there, or there twice.
    """
    opening = (package / "__init__.py").read_text()
    version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", opening, re.MULTILINE)
    imports = [node for node in ast.parse(opening).body if isinstance(node, ast.ImportFrom)]
    found: dict[str, list[ast.ClassDef]] = {name: [] for name in classes}
    for path in sorted(package.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name in found:
                found[node.name].append(node)
    for name, nodes in found.items():
        if len(nodes) != 1:
            raise ValueError(f"{package} defines class {name} {len(nodes)} times; expected once")
    return {
        "version": version and version[1],
        "exports": sorted(alias.asname or alias.name for node in imports for alias in node.names),
        "classes": {name: _read_class(nodes[0]) for name, nodes in found.items()},
    }


def signature(table: dict[str, Any], name: str, method: str) -> inspect.Signature:
    """The signature of a method as the table has it, `self` included."""
    parameters = table["classes"][name]["methods"][method]["parameters"]
    return inspect.signature(eval(f"lambda {parameters}: None", {"__builtins__": {}}))


def _read_class(node: ast.ClassDef) -> dict[str, Any]:
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and not _is_private(n.name)]
    stored = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    attributes = {n.attr for n in stored if isinstance(n.value, ast.Name) and n.value.id == "self"}
    return {
        "attributes": sorted(name for name in attributes if not _is_private(name)),
        "methods": {n.name: {"parameters": _parameters(n.args), "values": _values(n.returns)} for n in methods},
    }


def _is_private(name: str) -> bool:
    return name.startswith("_") and name != "__init__"


def _parameters(arguments: ast.arguments) -> str:
    """As Python writes them, without annotations. A default that is no literal becomes `...`: there is one."""
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    arguments.defaults = [_default(node) for node in arguments.defaults]
    arguments.kw_defaults = [node and _default(node) for node in arguments.kw_defaults]
    return ast.unparse(arguments)


def _default(node: ast.expr) -> ast.expr:
    try:
        ast.literal_eval(node)
    except ValueError:
        return ast.Constant(...)
    return node


def _values(annotation: ast.expr | None) -> int | None:
    """How many values a method returns, if its annotation says so by Tuple[...]."""
    if not isinstance(annotation, ast.Subscript) or not isinstance(annotation.slice, ast.Tuple):
        return None
    return len(annotation.slice.elts) if ast.unparse(annotation.value) in ("Tuple", "tuple") else None


def main(checkout: str, package: str, *classes: str) -> None:
    head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    table = {"commit": head.stdout.strip(), **read_package(Path(checkout) / package, classes)}
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
