"""`SupermaskModel`: masked layers in a model, and their masks on the way to and from a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..tuner.learnt import digest_at_hand
from ..tuner.targets import canonical, is_linear
from .layer import SupermaskLinear
from .masks import coded, decoded, scores_of

MASK = "supermask_mask"
ROOT = "base_model.model."


class SupermaskModel(BaseTuner):
    """Masks the weights of linear layers. Use it through `get_peft_model(model, SupermaskConfig())`."""

    prefix = "supermask_"
    tuner_layer_cls = SupermaskLinear
    peft_config: Any

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self._uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter.

        Raises:
            ValueError: a targeted module is no plain linear layer, or shares its weight with another; or a saved mask
                belongs to other base weights.
        """
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        names = [f"{layer.name}.weight" for layer in _layers(model) if adapter_name in layer.configs]
        for layer in _layers(model):
            layer._write([])
        here = digest_at_hand(model, names)
        if config.base_digest is not None and here not in (None, config.base_digest):
            raise ValueError(
                f"This mask was trained on other weights (digest {config.base_digest}, here {here}). Load the base "
                "model that it was trained on."
            )
        config.base_digest = config.base_digest or here

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SupermaskLinear):
            target.update_layer(adapter_name, peft_config)
            return
        weight: Any = getattr(target, "weight", None)
        plain = is_linear(target) and type(getattr(weight, "data", None)) is torch.Tensor and weight.is_floating_point()
        if not plain or weight.element_size() < 2:
            raise ValueError(
                f"target_modules: {current_key} is a {type(target).__name__}, and masks are for linear layers with "
                "plain weights. Leave it out, or load the base model unquantised."
            )
        if self._uses[id(weight)] > 1:
            raise ValueError(
                f"target_modules: the weight of {current_key} is used elsewhere too, as that of an output layer by its "
                f"embedding. Leave it out: exclude_modules=['{target_name}']."
            )
        new = SupermaskLinear(target, canonical(current_key))
        new.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Refused by name when they are targeted."""

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if not merge:
            for layer in _layers(self.model):
                layer.unmerge()
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    def sparsity(self, adapter_name: str = "default") -> dict[str, float]:
        """Share of zeros of each masked layer, by its name, and of `"all"` together, as it would be saved."""
        found = {layer.name: layer.mask(adapter_name) for layer in _layers(self.model) if adapter_name in layer.configs}
        zeros = {name: int((~mask).sum()) for name, mask in found.items()}
        sizes = {name: mask.numel() for name, mask in found.items()}
        shares = {name: zeros[name] / sizes[name] for name in found}
        return {**shares, "all": sum(zeros.values()) / max(1, sum(sizes.values()))}

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        result, zeros, weights = {}, 0, 0
        for key, layer in _named_layers(model):
            if adapter_name not in layer.configs:
                continue
            mask = layer.mask(adapter_name)
            result[f"{key}.{MASK}"] = coded(mask)
            zeros, weights = zeros + int((~mask).sum()), weights + mask.numel()
            scores = f"{key}.supermask_scores.{adapter_name}"
            if config.save_scores and scores in state_dict:
                result[scores] = state_dict[scores]
        config.final_sparsity = zeros / max(1, weights)
        return result

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Masks go to their layers, scores under their names in the model.

        Raises:
            ValueError: masks are missing, damaged, of other shapes, or of layers that the adapter does not have.
        """
        given = {key.removeprefix(ROOT): value for key, value in state_dict.items()}
        rest = {key: v for key, v in state_dict.items() if MASK not in key and "supermask_scores" not in key}
        for key, layer in _named_layers(model):
            if adapter_name not in layer.configs:
                continue
            own = key.removeprefix(ROOT)
            if f"{own}.{MASK}" not in given:
                raise ValueError(f"The file holds no mask of {layer.name}. It belongs to an adapter of other modules.")
            mask = decoded(given.pop(f"{own}.{MASK}"), layer.base_layer.weight.shape, layer.name)
            scores = given.pop(f"{own}.supermask_scores", None)
            if adapter_name in layer.supermask_scores:
                name = f"{key}.supermask_scores.{adapter_name}"
                rest[name] = scores_of(mask, config) if scores is None else scores
            else:
                layer.set_mask(adapter_name, mask)
        if extra := sorted(key for key in given if MASK in key):
            raise ValueError(f"The file holds {extra[0]}, which the adapter does not have. Is it another adapter's?")
        return rest


def _named_layers(model: nn.Module) -> Iterator[tuple[str, SupermaskLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, SupermaskLinear):
            yield name, module


def _layers(model: nn.Module) -> list[SupermaskLinear]:
    return [layer for _, layer in _named_layers(model)]
