"""Former names in stored files: adapters, plans, settings and certificates that were written by commit d665cba."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

NAMES = {
    "redrawn": "reinitialized",  # adapter_config.json
    "of": "relative_to",  # plan.json
    "rates": "learning_rates",
    "tried": "num_tried",  # certificates
    "own": "source_task",  # settings.json of the trajectory commands
    "full": "modules_to_save",
}
"""Present names of options by their former ones."""

VALUES = {"target_modules": {"vectors": "norms-and-biases"}}
"""Present values by their former ones, of options by their present names."""

Config = TypeVar("Config", bound=type)


def renamed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the former names in the contents of a file. Values are translated where a former name stands."""
    found = {NAMES.get(name, name): value for name, value in stored.items()}
    if NAMES.keys() & stored.keys():
        for name, values in VALUES.items():
            if isinstance(found.get(name), str):
                found[name] = values.get(found[name], found[name])
    return found


def as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate settings back to the former names: the keys of stored rows are digests that include them."""
    former = {present: name for name, present in NAMES.items()}
    return {former.get(name, name): value for name, value in settings.items()}


def reads_former_names(config: Config) -> Config:
    """Let a PEFT configuration class accept former names from files, which unlike users also give `peft_type`."""
    known: Any = config
    original = known.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **(renamed(kwargs) if "peft_type" in kwargs else kwargs))

    known.__init__ = __init__
    return config
