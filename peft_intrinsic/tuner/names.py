"""Names of modules and parameters: canonical form, matching, transformer blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import regex
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

VECTOR = "intrinsic"
"""The attribute of the root module with θ and λ."""

KEYWORDS = ("norms-and-biases", "all")
"""Values of `target_modules`, beside `"all-linear"`, that are no regular expression."""

MAX_REPEATS = 10_000
"""Limit of the product of all counts `{n}` in a regular expression: `regex` copies what they repeat."""

MATCH_TIMEOUT = 0.2
"""Seconds that a regular expression may take for one name: an adapter's configuration is untrusted input."""

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which `torch.compile`, activation checkpointing and FSDP 1 hold the module that they wrap."""

PARALLEL = (nn.DataParallel, DistributedDataParallel, AveragedModel)
"""Wrappers that hold the module as `module`, a name that models use too."""

ADAPTED = ("base_layer", "original_module")
"""Names under which PEFT's layers hold the module that they wrap."""

TOKENS = ("trainable_tokens_delta", "trainable_tokens_original")
"""Names of the modules that `trainable_token_indices` adds to an embedding."""


def block_of(name: str) -> str | None:
    """The name of the outermost numbered block of a parameter, such as `encoder.layer.3`."""
    block = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return block and block[0]


def kind_of(name: str) -> str:
    """A parameter's name within its numbered block."""
    return name.removeprefix(f"{block_of(name)}.")


def is_match(option: str, pattern: str, key: str) -> bool:
    """Whether a regular expression matches a whole name.

    Raises:
        ValueError: it repeats too much, takes longer than `MATCH_TIMEOUT`, or is invalid for `regex`, unlike for `re`.
    """
    repeats = math.prod(max(1, int(count)) for count in re.findall(r"(?<=[{,])\d+(?=[,}])", pattern))
    if repeats > MAX_REPEATS:
        raise ValueError(f"{option}={pattern!r} repeats parts more than {MAX_REPEATS} times. Use a simpler expression.")
    try:
        return regex.fullmatch(pattern, key, timeout=MATCH_TIMEOUT) is not None
    except TimeoutError:
        raise ValueError(f"{option}={pattern!r} takes too long to match {key!r}. Use a simpler expression.") from None
    except regex.error as error:
        raise ValueError(f"{option}={pattern!r} is not a regular expression: {error}.") from None


def is_named(names: Iterable[str], key: str) -> bool:
    """Whether a name is among `names` or ends with one of them, as in LoRA."""
    return any(key == name or key.endswith(f".{name}") for name in names)


def is_inside(modules: Iterable[str], key: str) -> bool:
    """Whether a module or parameter is one of `modules` or inside one."""
    return any(f".{module}." in f".{key}." for module in modules)


def canonical(name: str, model: nn.Module | None = None) -> str:
    """The name of a module or parameter in the plain base model, without the parts that wrappers add to it.

    Args:
        name: of a module or parameter of `model`.
        model: to distinguish a data-parallel wrapper's `module` from another module of that name.
    """
    parts = name.split(".")
    plain = []
    for i, part in enumerate(parts):
        if part in WRAPPED or (i and part in ADAPTED) or parts[i : i + 2] == ["token_adapter", "base_layer"]:
            continue
        if part == "module" and model and isinstance(model.get_submodule(".".join(parts[:i])), PARALLEL):
            continue
        plain.append(part)
    return ".".join(plain)


def is_foreign(name: str) -> bool:
    """Whether a module or parameter belongs to an adapter of another kind, not to the base model."""
    return any(f".{part}." in f".{name}." for part in ("modules_to_save", *TOKENS))
