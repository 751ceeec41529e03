"""What is done with adapters once they are attached: merging, combining, mixing, loading their numbers."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import IntrinsicLayer
from .mixed import BASE, check_mixable, differences, routes_by_name
from .modules import IntrinsicHook
from .wrap import unwrap

HOLDER = "intrinsic"
SURVIVING = 0.95
"""A merge that keeps less of the offset's norm than this warns."""


def _with_names(module: nn.Module, args: Any, kwargs: Any, names: list[str]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}


class AdapterOperations(BaseTuner):
    """The half of `IntrinsicModel` that acts on attached adapters."""

    prefix = "intrinsic_"
    tuner_layer_cls = IntrinsicLayer
    peft_config: Any

    @property
    def vector(self) -> Any:
        """The holder of θ and λ, an `IntrinsicVector`."""
        return self.model.get_submodule(HOLDER)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT, all layers or none.

        Raises:
            ValueError: with `safe_merge`, a merged weight would not be finite; or a quantised weight cannot be merged.
        """
        layers = [layer for layer in self.model.modules() if isinstance(layer, IntrinsicLayer)]
        before = [list(layer.merged_adapters) for layer in layers]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except Exception:
            for layer, names in zip(layers, before, strict=True):
                with onload_layer(layer):
                    layer.unmerge()
                    if names:
                        layer.merge(adapter_names=names)
            raise
        lost, whole = (sum(layer.rounding[i] for layer in layers) for i in (0, 1))
        survives = 1 - math.sqrt(lost / whole) if whole else 1.0
        if survives < SURVIVING:
            warnings.warn(
                f"Rounding to the base model's precision kept {max(survives, 0):.0%} of the merged offset's norm. Load "
                "the base in float32 before merging to keep it, or leave the adapter unmerged.",
                stacklevel=2,
            )

    def _check_merge_allowed(self) -> None:
        """Tied weights share one offset, which one owner merges: nothing to warn of."""

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """See `_check_merge_allowed`."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        unwrap(self.model, [child])

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
            for parameter in self.model.parameters():
                parameter._is_hf_initialized = True  # a head that was drawn here is a trained one now
        hooked = [module for module in self.model.modules() if isinstance(module, IntrinsicHook)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged|Already following adapters were merged")
            super()._unload_and_optionally_merge(merge, progressbar, adapter_names=adapter_names)
        unwrap(self.model, hooked)
        self.vector.guard.remove()
        delattr(self.model, HOLDER)
        return self.model

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add the adapter whose offset is the weighted sum of the given adapters' offsets, exactly: P is linear.

        Args:
            adapters: names of attached adapters of one projection (same d, seed, block size, scale, targets).
            weights: a factor for each.
            adapter_name: of the new adapter.
            combination_type: `"linear"`.

        Raises:
            ValueError: the adapters have different projections or (SAID) different λ, so that no single θ is their sum;
                names, weights or type that do not fit.
        """
        if combination_type != "linear":
            raise ValueError(f"combination_type must be 'linear', which is exact here, got {combination_type!r}.")
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"adapters ({len(adapters)}) and weights ({len(weights)}) must be as many, at least one.")
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"adapters={unknown} are not attached. Attached are {list(self.peft_config)}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} is taken. Delete that adapter or choose another name.")
        first = self.peft_config[adapters[0]]
        vector = self.vector
        for name in adapters[1:]:
            if unlike := differences(first, self.peft_config[name]):
                raise ValueError(f"Adapters {adapters[0]!r} and {name!r} have no exact sum: they differ in {unlike}.")
            if first.said and not torch.equal(*(vector.intrinsic_lambda[n].weight for n in (adapters[0], name))):
                raise ValueError(
                    f"Adapters {adapters[0]!r} and {name!r} have different λ, so no θ gives the sum of their offsets "
                    "(said=True). Keep both active instead: set_adapter([…]) adds offsets."
                )
        if first.full_modules:
            raise ValueError(f"modules_to_save={first.full_modules} cannot be combined. Train without it.")
        self.peft_config[adapter_name] = copy.copy(first)
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            total = sum(w * vector.intrinsic_theta[n].weight for n, w in zip(adapters, weights, strict=True))
            vector.intrinsic_theta[adapter_name].weight.copy_(total)
            if first.said:
                vector.intrinsic_lambda[adapter_name].weight.copy_(vector.intrinsic_lambda[adapters[0]].weight)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """`adapter_names`: one adapter for each sample of the batch.

        Raises:
            ValueError: the model is in training mode, a name is unknown, or a targeted module cannot be mixed.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass adapter_names when the model is in training mode. Call model.eval() first.")
        if unknown := sorted(set(names) - {BASE, *self.peft_config}):
            raise ValueError(f"adapter_names={unknown} are not attached. Attached are {list(self.peft_config)}.")
        batch = next((len(v) for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim()), len(names))
        if batch != len(names):
            raise ValueError(f"adapter_names has {len(names)} entries for a batch of {batch}: name one per sample.")
        check_mixable(self.model, set(names))
        with ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):  # modules_to_save
                    hook = partial(_with_names, names=list(names))
                    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            stack.enter_context(self.vector.routed(routes_by_name(self.vector, self.peft_config, names)))
            yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Raises ValueError where the file does not hold exactly the θ and λ that the configuration asks for."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = re.compile(rf"(^|\.){HOLDER}\.intrinsic_\w+\.{re.escape(adapter_name)}\.weight$")
        expected = {name: parameter for name, parameter in model.named_parameters() if own.search(name)}
        remedy = "File and configuration do not belong together, or the file is damaged: save the adapter again."
        if extra := sorted(name for name in found if "intrinsic_" in name and name not in expected):
            raise ValueError(f"The file holds {extra}, which this adapter does not have. {remedy}")
        for name, parameter in expected.items():
            shape = tuple(found[name].shape) if name in found else "nothing"
            if shape != tuple(parameter.shape):
                raise ValueError(
                    f"{name}: the file holds {shape}, the configuration (d={config.d}, said={config.said}) asks "
                    f"for {tuple(parameter.shape)}. {remedy}"
                )
            if not found[name].is_floating_point():
                raise ValueError(f"{name}: the file holds {found[name].dtype}, not floating-point numbers. {remedy}")
            if not torch.isfinite(found[name]).all():
                raise ValueError(f"{name}: the file holds NaN or infinite values. {remedy}")
        return found
