"""Every public name says what it is and what it takes."""

from __future__ import annotations

import inspect
import pkgutil
import re
from dataclasses import fields, is_dataclass
from importlib import import_module

import pytest

import peft_intrinsic


def public_names() -> list[str]:
    """The names that the package and its subpackages export."""
    packages = ["peft_intrinsic"] + [
        f"peft_intrinsic.{module.name}" for module in pkgutil.iter_modules(peft_intrinsic.__path__) if module.ispkg
    ]
    return [
        f"{package}.{name}"
        for package in packages
        for name in re.findall(r"import (\w+) as \1\b", inspect.getsource(import_module(package)))
        if inspect.isroutine(value := getattr(import_module(package), name)) or inspect.isclass(value)
    ]


@pytest.mark.parametrize("name", public_names())
def test_docstring_describes_every_parameter(name):
    package, _, own = name.rpartition(".")
    value = getattr(import_module(package), own)
    text = inspect.getdoc(value) or ""
    first = text.partition("\n\n")[0]
    assert first.endswith("."), "the first paragraph is not a sentence"
    own = value if inspect.isfunction(value) else vars(value).get("__init__", lambda: None)
    taken = set(inspect.signature(inspect.unwrap(own)).parameters) - {"self", "args", "kwargs"}
    hidden = {field.name for field in fields(value) if field.kw_only} if is_dataclass(value) else set()
    inherited = (
        {name for base in value.__mro__[1:] for name in vars(base).get("__annotations__", ())}
        if inspect.isclass(value)
        else set()
    )
    listed = set(re.findall(r"^ *((?:\w+, )*\w+)(?: \(.*\))?:(?: |$)", text, re.M))
    assert taken - hidden - inherited <= {name for names in listed for name in names.split(", ")}
