"""Benchmarks and scripts are run by hand, so nobody would see that a name of ours has moved."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path for folder in ("benchmarks", "scripts") for path in (ROOT / folder).glob("*.py")]


@pytest.mark.parametrize("path", sorted(FILES), ids=lambda path: path.stem)
def test_what_it_imports_of_ours_is_there(path):
    """Whatever it imports inside functions, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in modules:
            if name.split(".")[0] == "comigs":
                importlib.import_module(name)
        if not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] != "comigs":
            continue
        module = importlib.import_module(node.module)
        for alias in node.names:
            if not hasattr(module, alias.name):
                importlib.import_module(f"{node.module}.{alias.name}")
