"""First sentences of software's documentation, each with what it documents: tasks of 20 and of 77 classes.

pip install --no-deps botocore==1.44.8 sympy==1.14.0
"""

from __future__ import annotations

import ast
import gzip
import html
import json
import re
from importlib.metadata import PackageNotFoundError, PackagePath, files, version

MOST = 200
"""Sentences of a class."""


def list_files(package: str, expected: str, pattern: str) -> list[PackagePath]:
    """List an installed package's files.

    Raises:
        SystemExit: this version of the package is not installed.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "none"
    if found != expected:
        raise SystemExit(f"{package}: found {found}, expected {expected}. Run: pip install {package}=={expected}")
    return sorted(file for file in files(package) or [] if file.match(pattern))


def select(classes: dict[str, list[str]], count: int) -> list[tuple[str, str]]:
    """Sentences of the `count` largest classes. Short ones, and those of two classes, are left out."""
    owners: dict[str, set[str]] = {}
    for name, texts in classes.items():
        for text in texts:
            owners.setdefault(text, set()).add(name)
    own: dict[str, list[str]] = {}
    for text, names in owners.items():
        if len(names) == 1 and len(text) > 15:
            own.setdefault(*names, []).append(text)  # type: ignore[misc]
    largest = sorted(own, key=lambda name: (-len(own[name]), name))[:count]
    return [(text, name) for name in largest for text in own[name][:MOST]]


def load_services() -> list[tuple[str, str]]:
    """Operations of the 77 largest services of AWS, in their own words: "Creates a network access point."."""
    latest = {path.parents[1]: path for path in list_files("botocore", "1.44.8", "data/*/*/service-2.json.gz")}
    classes: dict[str, list[str]] = {}
    for path in latest.values():
        service = json.loads(gzip.decompress(path.read_binary()))
        name = re.sub("^(AWS|Amazon) ?", "", service["metadata"]["serviceFullName"])
        for operation in service["operations"].values():
            text = " ".join(html.unescape(re.sub("<[^>]+>", " ", operation.get("documentation", ""))).split())
            classes.setdefault(name, []).append(re.split(r"(?<=[a-z)])\. ", text)[0][:200])
    return select(classes, 77)


def load_modules() -> list[tuple[str, str]]:
    """Functions and classes of the 20 largest subpackages of SymPy, by the first paragraph of their docstrings."""
    classes: dict[str, list[str]] = {}
    for path in list_files("sympy", "1.14.0", "*.py"):
        if path.parts[0] != "sympy" or len(path.parts) < 3 or "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = (ast.get_docstring(node) or "").split("\n\n")[0]
                classes.setdefault(path.parts[1], []).append(" ".join(text.split())[:200])
    return select(classes, 20)
