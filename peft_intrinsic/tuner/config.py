"""`IntrinsicConfig`: every option, documented once."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils import PeftType, TaskType

from ..projection import ALGORITHM_VERSION, PROJECTIONS
from ..version import __version__
from .targets import KEYWORDS

SAME = ("d", "said", "lambda_granularity", "seed", "projection", "block_size", "scale", "algorithm_version")
"""Options that must agree for the numbers of two adapters to mean the same."""


WITH_HEAD = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
"""Tasks whose models have a head that PEFT would train in full."""


class NoModules(list):
    """`modules_to_save=None`, in a form that PEFT's task classes leave alone.

    They add the task head to the list, which would train it in full, and some fail on an empty one.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        super().__init__(["(none)"])

    def extend(self, names: Any) -> None:
        """Nothing is added."""

    def __reduce__(self) -> tuple[type[NoModules], tuple[()]]:
        return NoModules, ()


CARD_HEADING = "## How to load this adapter"
CARD_NOTE = f"""
{CARD_HEADING}

It needs the package `peft_intrinsic` (`pip install peft_intrinsic`), imported before PEFT loads the adapter:

```python
import peft_intrinsic
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path or name of this adapter")
```

Without the import PEFT raises `KeyError: 'INTRINSIC'`.
"""


@dataclass
class IntrinsicConfig(PeftConfig):
    """Configuration of an intrinsic-dimension adapter (Aghajanyan et al. 2020, arXiv 2012.13255).

    Args:
        d (`int`):
            How many numbers are trained, λ included (section 3: "exactly d parameters").
        said (`bool`):
            `False` is DID, `W = W0 + P(θ)` (section 3.1). `True` is SAID, `W_l = W0_l + λ_l P_l(θ)` (section 3.2): one
            learned scale per layer, taken out of d, so that θ has d − m entries.
        lambda_granularity (`"layer"`, `"module"` or `"tensor"`):
            What shares one λ. `"layer"`: each transformer block, what lies before the blocks, and what lies after.
        seed (`int`):
            Of the projection (0 to 2**63 − 1). Same seed and model, same P, on every device and platform.
        projection (`"fastfood"`, `"global"` or `"dense"`):
            How P is made. `"fastfood"` (section 3.1, Le et al. 2013): each tensor mixes coordinates of its own.
            `"global"`: Fastfood over θ as a whole, as in the paper. `"dense"` stores a Gaussian P (Li et al. 2018,
            section 2) and is for small models.
        block_size (`int`, *optional*):
            Order n of the Fastfood blocks, a power of two; `None` is 64. It bounds the rank of an offset, and larger
            blocks cost more. With `"global"` and n ≥ d every block mixes all of θ.
        scale (`"fan_in"` or `"isometric"`):
            `"fan_in"`: the size of an offset is relative to its tensor's fan-in, so that one learning rate serves every
            d and model. `"isometric"`: P is an isometry of the whole model (Li et al. 2018, section 2), to replicate
            papers; its learning rate depends on d and on the model.
        target_modules (`str` or `list[str]`, *optional*):
            Which modules are moved, as in LoRA: name suffixes, a regular expression, or `"all-linear"`. `"vectors"`:
            norms, biases and the task's head. `"all"`: every parameter, as in the paper. `None` is `"vectors"`, or
            `"all"` where those have fewer weights than d.
        exclude_modules (`str` or `list[str]`, *optional*):
            Modules that stay as they are: name suffixes or a regular expression.
        layers_to_transform (`int` or `list[int]`, *optional*):
            Indexes of the blocks to move. Not together with a regular expression or `"all-linear"`.
        layers_pattern (`str` or `list[str]`, *optional*):
            Name of the block list, where it is not found by itself. Needs `layers_to_transform`.
        target_parameters (`list[str]`, *optional*):
            Single parameters to move, by name suffix, as in LoRA. Alone, nothing else is moved.
        add_bias (`bool`):
            Give the targeted linear layers that have no bias one that starts at zero, such as all of a Llama's; not
            heads and output embeddings. Merging for good is refused where the model's class cannot hold them.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved in full, outside the d numbers.
        head (`"subspace"` or `"keep"`):
            `"subspace"` (section 3.3): whatever the checkpoint did not bring starts from a fixed random stream, the
            same for every adapter, and the task head is moved by P whatever `target_modules` says; so d numbers are
            the whole classifier. `"keep"`: the head is left as it is, and moved only if `target_modules` names it.
        redrawn (`list[str]`, *optional*):
            Names of the parameters that start from the fixed stream. `None` takes those that transformers reported as
            missing from the checkpoint, if nothing has changed them since.
        init_weights (`bool`):
            `True` starts at θ = 0, the pretrained model itself. `False` draws θ, from torch's generator, for tests.

    The remaining fields are filled in when the adapter is attached, and checked when it is loaded. A configuration that
    was filled in for one model can be passed for another: it then begins again, as a copy, from what was asked for.

    Raises:
        ValueError, TypeError: an option has a value that cannot work; the message names it and a remedy.
    """

    d: int = 200
    said: bool = False
    lambda_granularity: Literal["layer", "module", "tensor"] = "layer"
    seed: int = 0
    projection: str = "fastfood"
    block_size: int | None = None
    scale: Literal["fan_in", "isometric"] = "fan_in"
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    target_parameters: list[str] | None = None
    add_bias: bool = False
    modules_to_save: list[str] | None = None
    head: Literal["subspace", "keep"] = "subspace"
    init_weights: bool = True

    algorithm_version: int = ALGORITHM_VERSION
    requires: str = f"peft_intrinsic>={__version__}"
    redrawn: list[str] | None = field(default=None, metadata={"help": "Parameters that start from the fixed stream."})
    manifest: str | None = field(default=None, metadata={"help": "Marks of the targeted names and shapes."})
    checksum: str | None = field(default=None, metadata={"help": "Of the numbers in the file beside it."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("INTRINSIC")
        self._check()
        whole = self.modules_to_save
        loaded = self.manifest is not None  # and so perhaps by a class for such a task
        if isinstance(whole, NoModules) or (whole is None and (loaded or self.task_type in WITH_HEAD)):
            self.modules_to_save = NoModules()
        else:
            self.modules_to_save = None if whole is None else list(whole)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
        # Present and empty, it keeps PEFT from writing targeted embeddings into the adapter file.
        self.trainable_token_indices: dict[str, Any] = {}
        self.head_modules: set[str] = set()
        self.output_module: str | None = None
        self.asked: dict[str, Any] | None = None
        self.checksum_to_save: str | None = None

    def remember(self) -> dict[str, Any]:
        """The options that an attachment may fill in, as they are now."""
        now = {name: copy.copy(getattr(self, name)) for name in ("target_modules", "block_size", "redrawn", "manifest")}
        if self.manifest is None:
            self.asked = now
        return now

    def restore(self, options: dict[str, Any]) -> None:
        """Undo a failed attachment: `options` are what `remember` returned."""
        self.__dict__.update(options)
        self.asked = None if options is self.asked else self.asked

    def as_asked(self) -> IntrinsicConfig:
        """A copy as it was before an attachment filled it in."""
        fresh = copy.copy(self)
        fresh.restore(self.asked or {})
        return fresh

    def differences(self, other: IntrinsicConfig) -> list[str]:
        """What keeps the numbers of two adapters from meaning the same: options and values, none if they agree."""
        return [
            name + (f" ({getattr(self, name)!r} and {getattr(other, name)!r})" if name in SAME else "")
            for name in (*SAME, "manifest", "redrawn")
            if getattr(self, name) != getattr(other, name)
        ]

    def _check(self) -> None:
        for name, low in (("d", 1), ("seed", 0), ("block_size", 1), ("algorithm_version", 1)):
            value = getattr(self, name)
            if name == "block_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}.")
            setattr(self, name, value := int(value))  # numpy's integers cannot be written to a file
            if not low <= value < 2**63:
                raise ValueError(f"{name} must be at least {low} and below 2**63, got {value}.")
        if self.block_size is not None and self.block_size & (self.block_size - 1):
            below = 1 << (self.block_size.bit_length() - 1)
            raise ValueError(f"block_size must be a power of two, got {self.block_size}. Try {below} or {2 * below}.")
        choices = {
            "lambda_granularity": ("layer", "module", "tensor"),
            "projection": tuple(PROJECTIONS),
            "scale": ("fan_in", "isometric"),
            "head": ("subspace", "keep"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        for name in ("manifest", "checksum", "requires"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "requires"):
                raise TypeError(f"{name} must be a string, got {value!r}. Save the adapter again.")
        for name in ("said", "add_bias", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        self._check_names()
        alone = isinstance(self.target_modules, str) and self.target_modules not in KEYWORDS
        if alone and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} does not work with the target_modules string "
                f'{self.target_modules!r}. Pass target_modules as a list, "vectors" or "all".'
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform: pass the indexes of the blocks."
            )
        if self.algorithm_version > ALGORITHM_VERSION:
            raise ValueError(
                f"This adapter has algorithm_version={self.algorithm_version}; peft_intrinsic {__version__} knows "
                f"versions up to {ALGORITHM_VERSION}. Upgrade: pip install -U peft_intrinsic."
            )

    def _check_names(self) -> None:
        whole = ("target_parameters", "modules_to_save", "redrawn")
        for name in ("target_modules", "exclude_modules", "layers_pattern", *whole):
            value = getattr(self, name)
            alone = name not in whole
            listed = isinstance(value, list | set | tuple) and all(isinstance(item, str) for item in value)
            if not (value is None or listed or (alone and isinstance(value, str))):
                kinds = "a string or a list of strings" if alone else "a list of strings"
                raise TypeError(f"{name} must be None or {kinds}, got {value!r}.")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            patterns = [value] if isinstance(value, str) else value if name == "layers_pattern" else ()
            for pattern in patterns or ():
                try:
                    re.compile(pattern)
                except (re.error, RecursionError, OverflowError) as error:
                    raise ValueError(f"{name}={pattern!r} is not a regular expression: {error}.") from None
        indexes = self.layers_to_transform
        for index in indexes if isinstance(indexes, list | tuple) else [0 if indexes is None else indexes]:
            if isinstance(index, bool) or not isinstance(index, int):
                raise TypeError(f"layers_to_transform must be None, an int or a list of ints, got {indexes!r}.")

    @property
    def full_modules(self) -> list[str] | None:
        """`modules_to_save` as the user gave it."""
        return None if isinstance(self.modules_to_save, NoModules) else self.modules_to_save

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary."""
        checksum = self.checksum_to_save or self.checksum
        return {**super().to_dict(), "modules_to_save": self.full_modules, "checksum": checksum}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and say in an existing model card how the adapter is loaded."""
        super().save_pretrained(str(save_directory), **kwargs)
        card = Path(save_directory, "README.md")
        if card.is_file() and CARD_HEADING not in (text := card.read_text(encoding="utf-8")):
            card.write_text(text + CARD_NOTE, encoding="utf-8")
