"""`IntrinsicConfig`: the options of the tuner."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils import PeftType, TaskType

from ..aliases import reads_stored_options
from ..card import add_sections
from ..projection import ALGORITHM_VERSION
from ..version import __version__
from .checks import check
from .subspace_files import EMBEDDED, copy_file, find_subspace

SAME = ("d", "said", "lambda_granularity", "seed", "projection", "block_size", "scale", "algorithm_version")
"""Options that must agree for θ to mean the same in two adapters."""

RESULTS = (
    *("block_size", "reinitialized", "manifest", "subspace_digest", "num_labels"),
    *("label_texts", "label_sketch", "value_sketch"),
)
"""Options that a model decides: they differ where a configuration is used for another one."""

RESOLVED = (
    *("projection", "target_modules", "target_parameters", "layers_to_transform", "modules_to_save"),
    *RESULTS,
)
"""Options that are resolved for a model when the adapter is attached."""

WITH_HEAD = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
"""Tasks whose models have a head that PEFT would train fully."""


class NoModules(list):
    """`modules_to_save=None`, in a form that PEFT's task classes leave alone.

    They add the task head to the list, which would train it fully, and some fail on an empty one.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        super().__init__(["(none)"])

    def extend(self, names: Any) -> None:
        """Nothing is added."""

    def __reduce__(self) -> tuple[type[NoModules], tuple[()]]:
        return NoModules, ()


@reads_stored_options
@dataclass
class IntrinsicConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of an [`IntrinsicModel`] (Aghajanyan et al. 2020, arXiv
    2012.13255).

    Learning rate: begin with 2e-4 (AdamW, no weight decay) for every d. From 4e-4 on a run can collapse to the
    majority class: lower it, or warm up. The gradient's norm is usually far above 1, so Trainer's `max_grad_norm=1.0`
    rescales every step, which hardly affects Adam.

    Args:
        d (`int`):
            Number of trainable parameters, λ included (section 3: "exactly d parameters"). 200 are enough for a few
            classes. With more than ten classes use `head="labels"`, or d of 20 and more per class.
        said (`bool`):
            `False` is DID, `W = W0 + P(θ)` (section 3.1). `True` is SAID, `W_l = W0_l + λ_l P_l(θ)` (section 3.2), with
            a trainable scale per layer. d includes the m scales, so that θ has d − m entries.
        lambda_granularity (`Literal["layer", "module", "tensor"]`):
            Group of parameters that has one λ. `"layer"`: each transformer block, everything before the blocks, and
            everything after them.
        seed (`int`):
            Seed of the projection, from 0 to 2**63 − 1. The same seed and model give the same P on every device and
            platform.
        projection (`Optional[Literal["fastfood", "global", "dense", "trajectory", "value_bias", "value_lora"]]`):
            How P is computed. `None` is `"value_bias"` for decoders that generate text, if no option selects
            parameters and d does not exceed the number of their values, and `"fastfood"` otherwise. `"fastfood"`
            (section 3.1, Le et al. 2013): each tensor mixes entries of θ of its own. `"global"`: Fastfood over θ as a
            whole, as in the paper. `"dense"`: a stored Gaussian matrix (Li et al. 2018, section 2), for small models.
            `"trajectory"`: the directions of a fine-tuning run (Zhang et al. 2023) from the file `subspace`, which
            lists the adapted parameters. d is allocated evenly to its groups: 32 directions for each of 12 layers, as
            in that paper, are `d=32 * 12`. `"value_bias"`: a bias of the values in every attention layer, and the
            task's head. Its directions are those that the layer's output projection reads most, computed from the base
            weights. Loading warns where the base model is quantized otherwise than in training. `"value_lora"`: the
            same biases as weights of rank one, for servers that know LoRA alone. Attaching runs the base model once.
        subspace (`Optional[str]`):
            The file that `peft_intrinsic.trajectory.fit_subspace` wrote, for `projection="trajectory"`. The adapter
            stores its path and digest.
        embed_subspace (`bool`):
            Save a copy of that file with the adapter.
        ensemble (`Optional[int]`):
            Start θ at the mean of this many random vectors. This replaces the ensemble of Zhang et al. 2023 (section
            3): all vectors of a mean get the same gradient, so under Adam their mean follows the path of one vector.
        block_size (`Optional[int]`):
            Order n of the Fastfood blocks, a power of two. `None` is 64. It bounds the rank of an offset, and larger
            blocks cost more. With `"global"` and n ≥ d every block mixes all of θ.
        scale (`Literal["fan_in", "isometric"]`):
            `"fan_in"`: offsets are relative to the fan-in of their tensor, so that one learning rate works for every d
            and model. Under `"trajectory"` they are relative to the length of the recorded run. `"isometric"`: P is an
            isometry of the whole model (Li et al. 2018, section 2) or of each group of a subspace, to replicate
            papers. Its best learning rate depends on d and on the model.
        target_modules (`Optional[Union[list[str], str]]`):
            The modules to adapt, as in LoRA: name suffixes, a regular expression, or `"all-linear"`.
            `"norms-and-biases"`: norms, biases and the task's head. `"all"`: every parameter, as in the paper. `None`
            is all value projections under `"value_bias"` and `"value_lora"`, and otherwise `"norms-and-biases"`, or
            `"all"` where those have fewer than d weights.
        exclude_modules (`Optional[Union[list[str], str]]`):
            The modules to leave unchanged: name suffixes or a regular expression.
        layers_to_transform (`Optional[Union[list[int], int]]`):
            The indexes of the layers to adapt. It does not work with a regular expression or `"all-linear"`. `None` is
            all of them, or of a decoder under `"value_bias"` and `"value_lora"` √d layers, at least eight.
        layers_pattern (`Optional[Union[list[str], str]]`):
            The name of the list of layers, if it is not found automatically. It needs `layers_to_transform`.
        target_parameters (`Optional[list[str]]`):
            Names or name suffixes of single parameters to adapt, as in LoRA. Without `target_modules`, nothing else is
            adapted.
        add_bias (`bool`):
            Add biases that start at zero to targeted linear layers without one, such as those of a Llama, but not to
            heads and output embeddings. `merge_and_unload` raises `ValueError` where the model's class cannot save
            them.
        modules_to_save (`Optional[list[str]]`):
            Modules that are trained and saved fully, beside the d parameters.
        trainable_token_indices (`Optional[Union[list[int], dict[str, list[int]]]]`):
            Rows of the input embedding, or of the named embeddings, that are trained and saved fully beside the d
            parameters, as in LoRA: for new tokens. P cannot adapt the same embedding.
        head (`Literal["subspace", "keep", "labels"]`):
            `"subspace"` (section 3.3): parameters that the checkpoint does not contain are re-initialized from a fixed
            seed, the same for every adapter, and P adapts the task's head whatever `target_modules` selects. The d
            parameters are then the whole classifier. `"keep"`: the head keeps its values, and is adapted only if
            `target_modules` names it. `"labels"`: as `"subspace"`, but the rows of a new head for classes are computed
            from the texts of the labels, so that it classifies before training. The model's tokenizer is needed.
        label_texts (`Optional[list[str]]`):
            For `head="labels"`: a text per label, in the order of their indices. `None` takes the names in the model's
            `id2label`.
        reinitialized (`Optional[list[str]]`):
            Names of the parameters that are re-initialized from a fixed seed. `None` takes those that transformers
            reported as missing from the checkpoint, if nothing has changed them since.
        serving (`Optional[Literal["lora"]]`):
            `"lora"`: adapt only what is exactly a LoRA, for servers such as vLLM. Where `projection=None` would be
            `"value_bias"`, it is `"value_lora"` (rank 1). Otherwise it adapts the weights of linear layers with
            `block_size=8` (rank 8). The rank and the size of the LoRA are logged. Options that select anything else
            raise `ValueError`. Attaching resolves it to other options, so adapters do not store it.
        init_weights (`bool`):
            `True` starts at θ = 0, the pretrained model itself. `False` starts at a random θ from torch's generator,
            for tests.

    The other fields are set when the adapter is attached, saved with it, and checked when it is loaded. A configuration
    can be used for several models: each adapter begins from the options that you passed.

    Raises:
        ValueError, TypeError: an option has a value that cannot work. The message names it and says what to do.

    Example:
        >>> from peft import get_peft_model
        >>> model = get_peft_model(base_model, IntrinsicConfig(d=200, task_type="SEQ_CLS"))
    """

    d: int = field(default=200, metadata={"help": "Number of trainable parameters, λ included."})
    said: bool = field(default=False, metadata={"help": "Add a trainable scale λ per layer."})
    lambda_granularity: Literal["layer", "module", "tensor"] = field(
        default="layer", metadata={"help": "Group of parameters that has one λ."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the projection."})
    projection: Literal["fastfood", "global", "dense", "trajectory", "value_bias", "value_lora"] | None = field(
        default=None, metadata={"help": "How the projection P is computed."}
    )
    subspace: str | None = field(default=None, metadata={"help": "File of directions, for 'trajectory'."})
    embed_subspace: bool = field(default=False, metadata={"help": "Save a copy of that file with the adapter."})
    ensemble: int | None = field(default=None, metadata={"help": "Start θ at the mean of this many random vectors."})
    block_size: int | None = field(default=None, metadata={"help": "Order of the Fastfood blocks. None is 64."})
    scale: Literal["fan_in", "isometric"] = field(default="fan_in", metadata={"help": "Scale of the offsets."})
    target_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt, as in LoRA, or 'norms-and-biases' or 'all'."}
    )
    exclude_modules: str | list[str] | None = field(default=None, metadata={"help": "Modules to leave unchanged."})
    layers_to_transform: int | list[int] | None = field(default=None, metadata={"help": "Layers to adapt."})
    layers_pattern: str | list[str] | None = field(default=None, metadata={"help": "Name of the list of layers."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Single parameters to adapt."})
    add_bias: bool = field(default=False, metadata={"help": "Add biases to targeted linear layers without one."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved fully, beside the d parameters."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of embeddings that are trained and saved fully, for new tokens."}
    )
    head: Literal["subspace", "keep", "labels"] = field(
        default="subspace", metadata={"help": "How the task head starts and is adapted."}
    )
    label_texts: list[str] | None = field(default=None, metadata={"help": "A text per label, for head='labels'."})
    reinitialized: list[str] | None = field(
        default=None, metadata={"help": "Parameters that are re-initialized from a fixed seed."}
    )
    serving: Literal["lora"] | None = field(
        default=None, metadata={"help": "Adapt only what is exactly a LoRA, for servers that take no other adapters."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start at θ = 0. False is for tests."})

    # Set by the attachment and by files; users cannot pass them.
    algorithm_version: int = field(kw_only=True, default=ALGORITHM_VERSION, metadata={"help": "Definition of P."})
    requires: str = field(kw_only=True, default=f"peft_intrinsic>={__version__}", metadata={"help": "What loads it."})
    manifest: str | None = field(kw_only=True, default=None, metadata={"help": "Digest of the adapted parameters."})
    checksum: str | None = field(kw_only=True, default=None, metadata={"help": "Checksum of the file with θ and λ."})
    subspace_digest: str | None = field(kw_only=True, default=None, metadata={"help": "Digest of the subspace file."})
    num_labels: int | None = field(kw_only=True, default=None, metadata={"help": "Labels of the base model's head."})
    label_sketch: list[float] | None = field(kw_only=True, default=None, metadata={"help": "Sketch of the new head."})
    value_sketch: list[float] | None = field(kw_only=True, default=None, metadata={"help": "Sketch of value biases."})

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
        self._requested: dict[str, Any] = {}  # the options before they were resolved
        self._resolved: dict[str, Any] = {}  # and after

    def as_requested(self) -> IntrinsicConfig:
        """Copy the configuration with the options that the user passed or set, before a model resolved them."""
        config = copy.copy(self)
        unchanged = [name for name in self._requested if getattr(self, name) == self._resolved[name]]
        config.__dict__.update({name: copy.copy(self._requested[name]) for name in unchanged})
        if self._requested:
            config._requested = {name: copy.copy(getattr(config, name)) for name in RESOLVED}
        return config

    def resolve(self, resolved: IntrinsicConfig) -> IntrinsicConfig:
        """Store the options of `resolved`, or return that one where this configuration belongs to another model."""
        options = {name: getattr(resolved, name) for name in RESOLVED}
        resolved._resolved = {name: copy.copy(value) for name, value in options.items()}
        if self._requested:
            return self if options == {name: getattr(self, name) for name in RESOLVED} else resolved
        if self.manifest is None:
            self._requested = {name: copy.copy(getattr(self, name)) for name in RESOLVED}
        self.__dict__.update(options, _resolved=resolved._resolved)
        return self

    def differences(self, other: IntrinsicConfig) -> list[str]:
        """Options, with their values, for which θ does not mean the same in two adapters; none if they agree."""
        return [
            name + (f" ({getattr(self, name)!r} and {getattr(other, name)!r})" if name in SAME else "")
            for name in (*SAME, "manifest", "reinitialized", "subspace_digest", "label_texts")
            if getattr(self, name) != getattr(other, name)
        ]

    @property
    def is_saved(self) -> bool:
        """Whether an adapter of this configuration is loaded: its base model must be that of the training."""
        return self.manifest is not None and (self.checksum is not None or bool(self.inference_mode))

    @property
    def full_modules(self) -> list[str] | None:
        """`modules_to_save` as the user passed it, each name once: PEFT adds heads at every use."""
        names = self.modules_to_save
        return None if names is None or isinstance(names, NoModules) else list(dict.fromkeys(names))

    @property
    def trained_beside(self) -> str:
        """The options that train more than the d parameters, with their values; empty without any."""
        options = {"modules_to_save": self.full_modules, "trainable_token_indices": self.trainable_token_indices}
        return ", ".join(f"{name}={value}" for name, value in options.items() if value)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary. Once attached, it lacks `serving`, which other options result from."""
        stored = super().to_dict()
        if self.manifest is not None:
            del stored["serving"]
        return {
            **stored,
            "modules_to_save": self.full_modules,
            "trainable_token_indices": self.trainable_token_indices or None,
            "checksum": self.checksum_to_save or self.checksum,
        }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load a configuration as in PEFT. A subspace file in the adapter's folder overrides the stored path.

        Raises:
            ValueError: the configuration is that of another method.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if not isinstance(config, cls):
            raise ValueError(
                f"{pretrained_model_name_or_path} has a {type(config).__name__}, not an IntrinsicConfig. Load it with "
                "PeftModel.from_pretrained."
            )
        if config.subspace is not None:
            config.subspace = find_subspace(pretrained_model_name_or_path, subfolder, config, kwargs)
        return config

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `adapter_config.json`, the subspace file if it is embedded, and a section of the model card."""
        path = self.subspace
        if self.embed_subspace:
            copy_file(Path(str(path)), Path(save_directory, EMBEDDED))
            self.subspace = EMBEDDED
        try:
            super().save_pretrained(str(save_directory), **kwargs)
        finally:
            self.subspace = path
        add_sections(Path(save_directory))
