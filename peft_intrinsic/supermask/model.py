"""`SupermaskModel`: attaches masked layers, and writes and reads their masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import _ExcludedModule
from torch import nn

from ..tuner.attach import check_replaceable
from ..tuner.base import CheckedTuner
from ..tuner.base_model import base_parameters, known_digest
from ..tuner.files import check_adapter_names
from ..tuner.loading import new_parameters, unmarked_parameters
from ..tuner.module_types import is_linear
from ..tuner.names import canonical
from ..tuner.targets import match_module
from .layer import SupermaskLinear
from .masks import decode_mask, encode_mask, restore_scores

MASK = "supermask_mask"
ROOT = "base_model.model."


class SupermaskModel(CheckedTuner):
    """Tuner that masks the weights of linear layers.

    Example:
        >>> model = get_peft_model(base, SupermaskConfig(initial_sparsity=0.03))
    """

    prefix = "supermask_"
    tuner_layer_cls = SupermaskLinear

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter.

        Raises:
            ValueError: an adapter's name is a part of a fully trained module's name; a targeted module is no plain
                linear layer in memory, or shares its weight with another module; the checkpoint does not contain a
                weight to mask; a saved mask was trained on other weights; or the configuration has an option that masks
                do not support.
        """
        config = self.peft_config[adapter_name]
        for option in ("trainable_token_indices", "target_parameters"):
            if value := getattr(config, option):
                raise ValueError(
                    f"{option}={value!r} is not supported by SupermaskConfig, which masks linear layers and trains "
                    "modules_to_save. Remove the option, or use LoraConfig or IntrinsicConfig."
                )
        check_adapter_names(model, self.peft_config, own=())
        for layer in _find_layers(model).values():
            layer.unmerge()  # a new adapter starts from the base weights
        modules = [module for _, module in model.named_modules(remove_duplicate=False)]
        self._uses = Counter(id(p) for module in modules for p in module._parameters.values() if p is not None)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if config.final_sparsity is None:  # a new adapter
            places = base_parameters(model)
            new = {*new_parameters(model, places), *unmarked_parameters(model, places)}
            masked = [layer.name for layer in _find_layers(model, adapter_name).values()]
            if random := [name for name in masked if f"{name}.weight" in new]:
                raise ValueError(
                    f"target_modules selects {', '.join(random)}, whose weights the checkpoint does not contain. They "
                    f"are random, and a mask does not store them. Pass modules_to_save={random} to train them fully, "
                    f"or exclude_modules={random} if the task does not use them."
                )
        digest = None if config.base_digest is None else _compute_digest(model, adapter_name)
        if digest not in (None, config.base_digest):
            raise ValueError(
                f"This mask was trained on other weights (digest {config.base_digest}, here {digest}). Load the base "
                "model that it was trained on. (For a new adapter with this configuration, set its base_digest and "
                "final_sparsity to None.)"
            )

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        # PEFT compares the ends of names without a dot: "classifier" of modules_to_save fits pre_classifier too.
        if any(f"{name}." in f"{canonical(key, self.model)}." for name in peft_config.modules_to_save or ()):
            return _ExcludedModule()
        return match_module(peft_config, key, self.model)

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
        if not plain or weight.element_size() < 2 or weight.is_meta or hasattr(weight, "ds_id"):
            raise ValueError(
                f"target_modules selects {current_key}, a {type(target).__name__}; masks need linear layers with plain "
                "weights in memory. Exclude it, or load the base model without quantization, offloading, tp_plan and "
                "ZeRO-3."
            )
        if self._uses[id(weight)] > 1:
            raise ValueError(
                f"target_modules selects {current_key}, whose weight another module shares (as a tied embedding does). "
                f"Exclude it: exclude_modules=['{target_name}']."
            )
        check_replaceable([(parent, target_name)])
        new = SupermaskLinear(target, canonical(current_key, self.model))
        new.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Do nothing: targeted modules with tied weights raise in `_create_and_replace`."""

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave the scores in float32. Raise ValueError if autocasting is off and the base model is not float32."""
        coarse = {layer.base_layer.weight.dtype for layer in _find_layers(self.model).values()} - {
            torch.float32,
            torch.float64,
        }
        if not autocast_adapter_dtype and coarse:
            raise ValueError(
                f"autocast_adapter_dtype=False is not supported for a base model in {coarse.pop()}: the scores of a "
                "mask need float32. Leave it at True."
            )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Raise ValueError if a forward pass gets `adapter_names` or `alora_offsets`."""
        if given := [name for name in ("adapter_names", "alora_offsets") if kwargs.get(name) is not None]:
            raise ValueError(
                f"{given[0]}={kwargs[given[0]]!r} is not supported by SupermaskConfig: all samples of a batch have the "
                "same mask. Split the batch, and call set_adapter(name) or disable_adapter() for each part."
            )
        yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters (by default the active ones) into the base weights, in all layers or none.

        Raises:
            ValueError: an adapter is not attached, its saved mask was not loaded, or scores are not finite.
        """
        self._check_masks(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_masks(self, adapter_names: list[str] | None) -> None:
        self._check_attached(adapter_names)
        for layer in _find_layers(self.model).values():
            for name in adapter_names or layer.active_adapters:
                if name in layer.configs:
                    layer.get_mask(name)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_masks(adapter_names)
        else:
            for layer in _find_layers(self.model).values():
                layer.unmerge()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def sparsity(self, adapter_name: str = "default") -> dict[str, float]:
        """Compute the fraction of zeros in each masked layer of an adapter by its name, and in all under `"all"`.

        Raises:
            ValueError: the adapter is not attached, its saved mask was not loaded, or scores are not finite.
        """
        self._check_attached(adapter_name)
        return _count_zeros(
            {layer.name: layer.get_mask(adapter_name) for layer in _find_layers(self.model, adapter_name).values()}
        )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        result, masks = {}, {}
        for key, layer in _find_layers(model, adapter_name).items():
            scores = state_dict.get(f"{key}.supermask_scores.{adapter_name}.weight")
            masks[key] = layer.get_mask(adapter_name, scores)
            own = canonical(key, model)
            result[f"{own}.{MASK}.{adapter_name}"] = encode_mask(masks[key])  # PEFT removes the adapter's name
            if config.save_scores and scores is not None:
                result[f"{own}.supermask_scores.{adapter_name}.weight"] = scores
        config.final_sparsity, config.base_digest = _count_zeros(masks)["all"], _compute_digest(model, adapter_name)
        return result

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Set the masks of the layers, and rename scores as in the model.

        Raises:
            ValueError: masks are missing, damaged, of other shapes, or of layers that the adapter does not have.
        """
        given = {canonical(key).removeprefix(ROOT): value for key, value in state_dict.items()}
        rest = {key: v for key, v in state_dict.items() if MASK not in key and "supermask_scores" not in key}
        for key, layer in _find_layers(model, adapter_name).items():
            own = canonical(key, model).removeprefix(ROOT)
            if f"{own}.{MASK}" not in given:
                raise ValueError(f"The file holds no mask of {layer.name}. It is an adapter of other modules.")
            mask = decode_mask(given.pop(f"{own}.{MASK}"), layer.base_layer.weight.shape, layer.name)
            former = given.pop(f"{own}.supermask_scores", None)  # key of the first versions
            scores = given.pop(f"{own}.supermask_scores.weight", former)
            if adapter_name in layer.supermask_scores:
                name = f"{key}.supermask_scores.{adapter_name}.weight"
                rest[name] = restore_scores(mask, config) if scores is None else scores
            else:
                layer.set_mask(adapter_name, mask)
            layer.awaited.discard(adapter_name)
        if extra := sorted(key for key in given if key.endswith(f".{MASK}")):
            raise ValueError(f"The file holds {extra[0]}, which is no layer of this adapter. Check its target_modules.")
        return rest


def _find_layers(model: nn.Module, adapter: str | None = None) -> dict[str, SupermaskLinear]:
    """Find the masked layers of a model, or those of one adapter, by their names in the model."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SupermaskLinear)}
    return {name: layer for name, layer in layers.items() if adapter is None or adapter in layer.configs}


def _count_zeros(masks: dict[str, torch.Tensor]) -> dict[str, float]:
    """Compute the fraction of zeros of each mask, and of all under "all"."""
    zeros = {name: int((~mask).sum()) for name, mask in masks.items()}
    fractions = {name: zeros[name] / mask.numel() for name, mask in masks.items()}
    return {**fractions, "all": sum(zeros.values()) / max(1, sum(mask.numel() for mask in masks.values()))}


def _compute_digest(model: nn.Module, adapter: str) -> str | None:
    """Compute a digest of the base weights under an adapter's masks; None if they are merged or not in memory."""
    layers = _find_layers(model, adapter).values()
    if any(layer.merged for layer in layers):
        return None
    for layer in layers:
        layer.write_zeros([])
    return known_digest(model, [f"{layer.name}.weight" for layer in layers])
