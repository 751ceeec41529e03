"""`SupermaskConfig`: the options of a supermask and their checks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils import PeftType

from ..card import add_sections
from ..tuner.checks import check_choices, check_layers
from ..version import __version__, pip_install


@dataclass
class SupermaskConfig(PeftConfig):
    """Configuration of a supermask: fine-tuning that sets some pretrained weights to zero, `W = W0 ∘ mask`.

    Each masked weight has a latent score, which training updates; the file holds one bit for each weight. Task heads
    are trained fully, as PEFT does for LoRA. Source: Radiya-Dixit and Wang 2020 (arXiv 2004.14129).

    Args:
        target_modules (`str` or `list[str]`):
            Linear layers to mask, as in LoRA: name suffixes, a regular expression, or `"all-linear"`.
        exclude_modules (`str` or `list[str]`, *optional*):
            Modules that are not masked.
        layers_to_transform (`int` or `list[int]`, *optional*):
            Indexes of the blocks to mask.
        layers_pattern (`str` or `list[str]`, *optional*):
            Name of the list of blocks, if it is not detected.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved fully.
        initial_sparsity (`float`):
            Fraction of zeros at the start, at least 0 and below 1. The final fraction depends on the learning rate.
        init (`"magnitude"` or `"random"`):
            Weights that are zero (or likely zero) at the start: the smallest of each layer, or a random selection.
        mask (`"threshold"` or `"bernoulli"`):
            How scores give the mask. `"threshold"`: a weight is unchanged while its score is positive; the gradient
            passes straight through. `"bernoulli"` (Zhou et al. 2019, arXiv 1905.01067): each training step samples it
            with the probability σ(score), and the gradient is that of σ; evaluation and the file have as many zeros as
            are expected, at the lowest scores.
        hold_sparsity (`bool`):
            Preserve the initial fraction of zeros in each layer, at the lowest scores. Needs `mask="threshold"`.
        seed (`int`):
            Seed of the random start.
        save_scores (`bool`):
            Save the scores too (32 bits for each weight), so that training resumes exactly. Without them, training
            continues from the mask.

        requires, base_digest, final_sparsity:
            Set by saving and checked by loading: the version of this package, the digest of the base model, and the
            fraction of zeros. For a new adapter with the configuration of a saved one, set them to None.

    Raises:
        ValueError, TypeError: An option has a value that cannot work.
        ImportError: The packages that code the masks are missing.
    """

    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    initial_sparsity: float = 0.03
    init: Literal["magnitude", "random"] = "magnitude"
    mask: Literal["threshold", "bernoulli"] = "threshold"
    hold_sparsity: bool = False
    seed: int = 0
    save_scores: bool = False

    requires: str = f"peft_intrinsic>={__version__}"
    final_sparsity: float | None = field(default=None, metadata={"help": "Fraction of zeros when it was saved."})
    base_digest: str | None = field(default=None, metadata={"help": "Digest of the weights under the mask."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("SUPERMASK")
        if isinstance(self.initial_sparsity, bool) or not isinstance(self.initial_sparsity, Real):
            raise TypeError(f"initial_sparsity must be a number, got {self.initial_sparsity!r}.")
        if not 0 <= self.initial_sparsity < 1:
            raise ValueError(f"initial_sparsity must be from 0 to below 1, got {self.initial_sparsity}. Try 0.03.")
        self.initial_sparsity = float(self.initial_sparsity)
        check_choices(self, {"init": ("magnitude", "random"), "mask": ("threshold", "bernoulli")})
        if self.hold_sparsity and self.mask == "bernoulli":
            raise ValueError(
                "hold_sparsity=True needs mask='threshold': a Bernoulli mask has no fixed number of zeros."
            )
        if self.mask == "bernoulli" and not self.initial_sparsity:
            raise ValueError("initial_sparsity=0 needs an infinite score under mask='bernoulli'. Try 0.03.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be an int from 0 to 2**63 - 1, got {self.seed!r}.")
        self.seed = int(self.seed)  # numpy's integers cannot be written to a file
        check_layers(self, ("all-linear",))
        if self.target_modules is None:
            raise ValueError('target_modules=None: name linear layers, or "all-linear".')
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        if find_spec("constriction") is None:  # before training, not when it is saved
            raise ImportError(f"Masks are saved entropy-coded, which needs constriction. {pip_install('[codec]')}")
        # Present and empty, it keeps PEFT from writing targeted output layers into the adapter file.
        self.trainable_token_indices: dict[str, Any] = {}
        self.target_parameters = None

    @property
    def full_modules(self) -> list[str] | None:
        """`modules_to_save`, under the name that the target matching reads."""
        return self.modules_to_save

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and a model card that says how to load the adapter."""
        super().save_pretrained(str(save_directory), **kwargs)
        add_sections(Path(save_directory))
