"""`IntrinsicConfig`: every option, documented once."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils import PeftType, TaskType

from ..aliases import reads_former_names
from ..card import add_sections
from ..projection import ALGORITHM_VERSION
from ..version import __version__
from .checks import check
from .subspace_files import EMBEDDED, beside, copy_whole

SAME = ("d", "said", "lambda_granularity", "seed", "projection", "block_size", "scale", "algorithm_version")
"""Options that must agree for the numbers of two adapters to mean the same."""


RESULTS = ("block_size", "reinitialized", "manifest", "subspace_digest", "num_labels")
"""Options that a model decides: they differ where a configuration is used for another one."""

RESOLVED = ("target_modules", "target_parameters", "modules_to_save", *RESULTS)
"""Options that are resolved for a model when the adapter is attached."""

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


@reads_former_names
@dataclass
class IntrinsicConfig(PeftConfig):
    """Configuration of an intrinsic-dimension adapter (Aghajanyan et al. 2020, arXiv 2012.13255).

    Learning rate: begin with 2e-4 (AdamW, no weight decay) for every d. Above 4e-4 a run can collapse to the majority
    class: lower it, or warm up. The gradient's norm is usually far above 1, so Trainer's `max_grad_norm=1.0` rescales
    every step, which Adam does not notice.

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
        projection (`"fastfood"`, `"global"`, `"dense"` or `"trajectory"`):
            How P is made. `"fastfood"` (section 3.1, Le et al. 2013): each tensor mixes coordinates of its own.
            `"global"`: Fastfood over θ as a whole, as in the paper. `"dense"` stores a Gaussian P (Li et al. 2018,
            section 2) and is for small models. `"trajectory"`: the directions of a fine-tuning (Zhang et al. 2023),
            from the file `subspace`, which says what is moved; d is dealt evenly over its groups, so the paper's 32 for
            each of 12 layers are `d=32 * 12`.
        subspace (`str`, *optional*):
            For `"trajectory"`: the file that `peft_intrinsic.trajectory.fit_subspace` wrote. The adapter keeps its
            place and digest.
        embed_subspace (`bool`):
            Save a copy of that file with the adapter.
        ensemble (`int`, *optional*):
            h: start θ at the mean of h random vectors. It stands for the ensemble of Zhang et al. 2023 (section 3): the
            h vectors of a mean get equal gradients, so under Adam their mean moves as one vector does.
        block_size (`int`, *optional*):
            Order n of the Fastfood blocks, a power of two; `None` is 64. It bounds the rank of an offset, and larger
            blocks cost more. With `"global"` and n ≥ d every block mixes all of θ.
        scale (`"fan_in"` or `"isometric"`):
            `"fan_in"`: the size of an offset is relative to its tensor's fan-in, so that one learning rate serves every
            d and model; under `"trajectory"`, to the length of the recorded run. `"isometric"`: P is an isometry of the
            whole model (Li et al. 2018, section 2), or of each group of a subspace, to replicate papers; its learning
            rate depends on d and on the model.
        target_modules (`str` or `list[str]`, *optional*):
            Which modules are adapted, as in LoRA: name suffixes, a regular expression, or `"all-linear"`.
            `"norms-and-biases"`: norms, biases and the task's head. `"all"`: every parameter, as in the paper. `None`
            is `"norms-and-biases"`, or `"all"` where those have fewer weights than d.
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
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Rows of the input embedding, or of the named embeddings, that are trained and saved in full beside the d
            parameters, as in LoRA: for new tokens. P cannot adapt the same embedding.
        head (`"subspace"` or `"keep"`):
            `"subspace"` (section 3.3): whatever the checkpoint did not bring starts from a fixed random stream, the
            same for every adapter, and the task head is moved by P whatever `target_modules` says; so d numbers are
            the whole classifier. `"keep"`: the head is left as it is, and moved only if `target_modules` names it.
        reinitialized (`list[str]`, *optional*):
            Names of the parameters that are re-initialized from a fixed seed. `None` takes those that transformers
            reported as missing from the checkpoint, if nothing has changed them since.
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
    subspace: str | None = None
    embed_subspace: bool = False
    ensemble: int | None = None
    block_size: int | None = None
    scale: Literal["fan_in", "isometric"] = "fan_in"
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    target_parameters: list[str] | None = None
    add_bias: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    head: Literal["subspace", "keep"] = "subspace"
    init_weights: bool = True

    algorithm_version: int = ALGORITHM_VERSION
    requires: str = f"peft_intrinsic>={__version__}"
    reinitialized: list[str] | None = field(
        default=None, metadata={"help": "Parameters that are re-initialized from a fixed seed."}
    )
    manifest: str | None = field(default=None, metadata={"help": "Marks of the targeted names and shapes."})
    checksum: str | None = field(default=None, metadata={"help": "Of the numbers in the file beside it."})
    subspace_digest: str | None = field(default=None, metadata={"help": "Of the contents of the subspace file."})
    num_labels: int | None = field(default=None, metadata={"help": "Number of labels of the base model's head."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("INTRINSIC")
        check(self)
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
        # Empty instead of None, it keeps PEFT from writing targeted embeddings into the adapter file.
        self.trainable_token_indices = self.trainable_token_indices or {}
        self.checksum_to_save: str | None = None
        self._requested: dict[str, Any] = {}  # the options before they were resolved; never changed

    def as_requested(self) -> IntrinsicConfig:
        """A copy with the options that the user chose, before they were resolved for a model."""
        config = copy.copy(self)
        config.__dict__.update(self._requested)
        return config

    def resolve(self, resolved: IntrinsicConfig) -> IntrinsicConfig:
        """Store the options of `resolved`, or return that one where this configuration belongs to another model."""
        options = {name: getattr(resolved, name) for name in RESOLVED}
        if self._requested:
            return self if all(getattr(self, name) == options[name] for name in RESULTS) else resolved
        if self.manifest is None:
            self._requested = {name: copy.copy(getattr(self, name)) for name in RESOLVED}
        self.__dict__.update(options)
        return self

    def differences(self, other: IntrinsicConfig) -> list[str]:
        """What keeps the numbers of two adapters from meaning the same: options and values, none if they agree."""
        return [
            name + (f" ({getattr(self, name)!r} and {getattr(other, name)!r})" if name in SAME else "")
            for name in (*SAME, "manifest", "reinitialized", "subspace_digest")
            if getattr(self, name) != getattr(other, name)
        ]

    @property
    def full_modules(self) -> list[str] | None:
        """`modules_to_save` as the user gave it."""
        return None if isinstance(self.modules_to_save, NoModules) else self.modules_to_save

    @property
    def trained_beside(self) -> str:
        """The options by which more is trained than the d parameters, with their values; empty without any."""
        options = {"modules_to_save": self.full_modules, "trainable_token_indices": self.trainable_token_indices}
        return ", ".join(f"{name}={value}" for name, value in options.items() if value)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary."""
        return {
            **super().to_dict(),
            "modules_to_save": self.full_modules,
            "trainable_token_indices": self.trainable_token_indices or None,
            "checksum": self.checksum_to_save or self.checksum,
        }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As in PEFT. A subspace file that lies beside the adapter is used before one at its former place."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if config.subspace is not None:
            config.subspace = beside(pretrained_model_name_or_path, subfolder, config, kwargs)
        return config

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and the subspace file if it is embedded; say in a model card how to load."""
        place = self.subspace
        if self.embed_subspace:
            copy_whole(Path(str(place)), Path(save_directory, EMBEDDED))
            self.subspace = EMBEDDED
        try:
            super().save_pretrained(str(save_directory), **kwargs)
        finally:
            self.subspace = place
        add_sections(Path(save_directory))
