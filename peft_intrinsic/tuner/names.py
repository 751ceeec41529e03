"""Names of modules and parameters: canonical form, matching, transformer blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable

import regex
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

HOLDER = "intrinsic"
"""The attribute of the root that holds θ and λ."""

KEYWORDS = ("norms-and-biases", "all")
"""Values of `target_modules` beside `"all-linear"` that are no regular expression."""

PATIENCE = 0.2
"""Seconds that a regular expression may take for one name: an adapter's configuration can come from a stranger."""


WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Under which names `torch.compile`, activation checkpointing and FSDP 1 hold the module that they wrap."""

PARALLEL = (nn.DataParallel, DistributedDataParallel, AveragedModel)
"""Wrappers that hold the module as `module`, a name that models use too."""

ADAPTED = ("base_layer", "original_module")
"""Under which names PEFT's layers hold the module that they wrap."""

TOKENS = ("trainable_tokens_delta", "trainable_tokens_original")
"""What `trainable_token_indices` adds to an embedding."""


def block_of(name: str) -> str | None:
    """The numbered block that a parameter lies in, the outermost one, such as `encoder.layer.3`."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return found and found[0]


def kind_of(name: str) -> str:
    """A parameter's name within its numbered block."""
    return name.removeprefix(f"{block_of(name)}.")


def fits(option: str, pattern: str, key: str) -> bool:
    """Whether a regular expression matches the whole of a name.

    Raises:
        ValueError: it takes longer than `PATIENCE`, or is none to `regex`, which asks for more than `re`.
    """
    try:
        return regex.fullmatch(pattern, key, timeout=PATIENCE) is not None
    except TimeoutError:
        raise ValueError(f"{option}={pattern!r} takes too long to match {key!r}. Use a simpler expression.") from None
    except regex.error as error:
        raise ValueError(f"{option}={pattern!r} is not a regular expression: {error}.") from None


def named(names: Iterable[str], key: str) -> bool:
    """Whether a name is among `names` or ends with one of them, as in LoRA."""
    return any(key == name or key.endswith(f".{name}") for name in names)


def inside(modules: Iterable[str], key: str) -> bool:
    """Whether a module or parameter is one of `modules`, or lies in one."""
    return any(f".{module}." in f".{key}." for module in modules)


def canonical(name: str, model: nn.Module | None = None) -> str:
    """A module or parameter name as it is in the plain base model, without what wrappers add to it.

    Args:
        name: of a module or parameter of `model`.
        model: tells a data-parallel wrapper's `module` from a module that is called so.
    """
    parts = name.split(".")
    kept = []
    for i, part in enumerate(parts):
        if part in WRAPPED or (i and part in ADAPTED) or parts[i : i + 2] == ["token_adapter", "base_layer"]:
            continue
        if part == "module" and model and isinstance(model.get_submodule(".".join(parts[:i])), PARALLEL):
            continue
        kept.append(part)
    return ".".join(kept)


def foreign(name: str) -> bool:
    """Whether a module or parameter belongs to an adapter of another kind, not to the base model."""
    return any(f".{part}." in f".{name}." for part in ("modules_to_save", *TOKENS))
