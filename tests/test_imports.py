"""Imports run one way: no file and no package imports what imports it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("peft_intrinsic*/__init__.py"))
PATHS = [path for package in PACKAGES for path in ROOT.glob(f"{package}/**/*.py")]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PATHS}


def imported(module: str) -> Iterator[str]:
    """The project's files that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name for item in node.names for name in (item.name, f"{item.name}.__init__") if name in FILES)
        if not isinstance(node, ast.ImportFrom):
            continue
        parents = module.split(".")[: -node.level] if node.level else []
        source = ".".join([*parents, *([node.module] if node.module else [])])
        for name in node.names:
            for file in (f"{source}.{name.name}", source, f"{source}.__init__"):
                if file in FILES:
                    yield file
                    break


def order(parts: int) -> list[str]:
    """Files, or packages cut to so many parts of their names, each after all that it imports."""
    graph: dict[str, set[str]] = {}
    for module in FILES:
        here = ".".join(module.split(".")[:parts])
        graph.setdefault(here, set()).update({".".join(file.split(".")[:parts]) for file in imported(module)} - {here})
    return list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("parts", [2, 9], ids=["packages", "files"])
def test_no_import_closes_a_circle(parts):
    names = order(parts)
    assert names.index("peft_intrinsic.projection" if parts == 2 else "peft_intrinsic.projection.base") < len(names) / 2


def test_a_circle_is_reported(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text("from .b import x\n")
    (tmp_path / "b.py").write_text("from . import a\n")
    monkeypatch.setattr("test_imports.FILES", {f"p.{name}": tmp_path / f"{name}.py" for name in "ab"})
    with pytest.raises(CycleError):
        order(9)
