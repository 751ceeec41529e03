"""`IntrinsicModel`: PEFT's tuner, whose methods call the other modules of this package."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..projection import OF_VALUES, ValueBias
from .adapter_names import select_by_name
from .attach import attach, detach, remove_vector, unwrap
from .attention import find_value_projections
from .base import CheckedTuner
from .batch_first import count_samples
from .checks import check
from .files import check_adapter_names, vectors_to_load, vectors_to_save
from .head import Reinitialization, count_labels, explain_labels, restore_values
from .label_head import LabelHead
from .layer import IntrinsicLayer
from .loading import clear_notes
from .lora_targets import check_lora_options, select_for_lora
from .manifest import compute_manifest
from .merging import add_zero_bias, find_bias_flags
from .names import KEYWORDS, VECTOR, canonical, is_foreign
from .parametrized import IntrinsicParameters
from .subspace_files import read_subspace
from .targets import (
    default_layers,
    default_projection,
    default_targets,
    find_targets,
    is_head,
    match_module,
    outermost_modules,
    targeted_parameters,
)
from .to_lora import report_lora
from .vector import IntrinsicVector

logger = logging.getLogger(__name__)

MIN_PRESERVED = 0.95
"""Merging warns if rounding preserves less than this fraction of the norm of the offset."""


class IntrinsicModel(CheckedTuner):
    """Adapts the weights of a model through a fixed random projection of one trainable vector θ: `W = W0 + P(θ)`.

    Aghajanyan et al. 2020 (arXiv 2012.13255).

    Args:
        model: the base model.
        peft_config: an `IntrinsicConfig`, or a dictionary of them by adapter names.
        adapter_name: name of the first adapter.
        low_cpu_mem_usage: create θ and λ on the meta device, for loading.

    Example:
        >>> model = get_peft_model(base_model, IntrinsicConfig(d=200))
    """

    prefix = "intrinsic_"
    tuner_layer_cls = IntrinsicLayer
    peft_config: Any
    _matched_modules: set[nn.Module]  # while an adapter is attached: the modules and parameters that PEFT targets
    _matched_names: list[str]
    _values: dict[str, ValueBias]  # while an adapter is attached

    @property
    def vector(self) -> IntrinsicVector:
        """The module with θ and λ of all adapters."""
        return cast(IntrinsicVector, self.model.get_submodule(VECTOR))

    def tuner_layers(self) -> list[IntrinsicLayer]:
        """The tuner layers of the model."""
        return [module for module in self.model.modules() if isinstance(module, IntrinsicLayer)]

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Attach an adapter as in PEFT. After an error, the model and the configuration are unchanged.

        Raises:
            ValueError: nothing is targeted; d does not exceed the number of λ, or exceeds that of the adapted weights;
                the model is not the one that a saved adapter was trained on; or `state_dict` is given.
        """
        if state_dict is not None:
            raise ValueError(
                "An intrinsic adapter cannot be injected from a state_dict, which contains θ but no names of modules. "
                "Pass the saved configuration instead."
            )
        if not isinstance(getattr(model, VECTOR, None), IntrinsicVector | None):
            raise ValueError(f"The model already has an attribute {VECTOR!r}, which the adapter needs. Rename it.")
        if hasattr(model, VECTOR) and adapter_name in self.vector.intrinsic_theta:
            raise ValueError(f"An adapter {adapter_name!r} is attached already. Delete it, or choose another name.")
        first = not hasattr(model, VECTOR)
        trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
        config = self.peft_config[adapter_name]
        check(config)  # again: options can be changed after the configuration was created
        options = self.peft_config[adapter_name] = config.as_requested()  # PEFT resolves some of them
        default = options.projection is None
        try:
            start = self._resolve(model, adapter_name)
            # PEFT does not visit the root.
            self._matched_modules = {model} if options.target_modules in KEYWORDS else set()
            self._matched_names = []
            options.trainable_token_indices = config.trainable_token_indices or None
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            options.trainable_token_indices = config.trainable_token_indices  # for saving, empty instead of None
            targeting = find_targets(model, options, self._matched_modules, self._matched_names, self._values)
            resolved = copy.copy(options)
            resolved.manifest, resolved.block_size = compute_manifest(targeting.shapes), targeting.spec.block_size
            attached = [name for name in self.peft_config if not first and name in self.vector.intrinsic_theta]
            twin = next((name for name in attached if not resolved.differences(self.peft_config[name])), None)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                attach(model, adapter_name, targeting, options, twin)
            if options.serving:
                report_lora(model, adapter_name)
        except Exception as error:
            detach(model, adapter_name)
            self.peft_config[adapter_name] = config
            for parameter, trained in trainable.items():
                parameter.requires_grad_(trained)
            if labels := explain_labels(options.num_labels, model, config.task_type):
                raise ValueError(labels) from error
            raise
        finally:
            self._matched_modules, self._matched_names, self._values = set(), [], {}
        options.manifest, options.block_size = resolved.manifest, resolved.block_size
        options.num_labels = count_labels(model, config.task_type)
        self.peft_config[adapter_name] = config.resolve(options)
        start.apply(self.vector.replaced)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if not first:  # other adapters remain trainable or frozen
            for parameter, trained in trainable.items():
                parameter.requires_grad_(trained)
        if default and options.projection == "value_bias" and logger.isEnabledFor(logging.INFO):
            self._report_unsavable_biases(adapter_name)

    def _report_unsavable_biases(self, adapter_name: str) -> None:
        """Report that `merge_and_unload` will not work, because the model's class cannot have the biases."""
        try:
            find_bias_flags(self.model, self._added_biases([adapter_name]))
        except ValueError as error:
            logger.info("merge_and_unload will raise an error. %s", error)

    def _added_biases(self, adapters: Iterable[str]) -> Iterator[str]:
        """Names of the biases that layers lack, for some adapters and the merged ones."""
        return chain.from_iterable(layer.added_biases(adapters) for layer in self.tuner_layers())

    def _resolve(self, model: nn.Module, adapter_name: str) -> Reinitialization:
        """Resolve the options of a new adapter for the model, which is not changed."""
        config = self.peft_config[adapter_name]
        attached = list(self.vector.intrinsic_theta) if hasattr(model, VECTOR) else []
        configs = {name: self.peft_config.get(name, config) for name in attached}
        default = config.projection is None
        values = find_value_projections(model, config.projection) if default or config.projection in OF_VALUES else {}
        config.projection = config.projection or default_projection(model, config, values)
        if config.serving and default and config.projection == "value_bias":
            config.projection = "value_lora"
            values = find_value_projections(model, config.projection)
        self._values = values if config.projection in OF_VALUES else {}
        config.modules_to_save = outermost_modules(model, config)
        check_adapter_names(model, {**configs, adapter_name: config})
        start = (LabelHead if config.head == "labels" else Reinitialization)(model, config, configs)
        config.reinitialized, config.label_texts, config.label_sketch = start.names, start.texts, start.sketch
        if config.serving:
            check_lora_options(model, config)
            if config.projection not in OF_VALUES:
                select_for_lora(model, config)
        if config.projection == "trajectory":
            config.subspace_digest, config.target_parameters = read_subspace(model, config)
        if config.target_modules is None and not config.target_parameters:
            if config.layers_to_transform is None and config.projection in OF_VALUES:
                config.layers_to_transform = default_layers(model, config, self._values)
            config.target_modules = default_targets(model, config)
        return start

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        name = canonical(key, self.model)
        if name.partition(".")[0] == VECTOR or is_foreign(key):
            return False
        matched = match_module(peft_config, key, self.model)
        return is_head(peft_config, name) if matched is False else matched

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
        """Note the module. It is wrapped later, when all targeted parameters are known."""
        self._matched_modules.add(target.get_base_layer() if isinstance(target, IntrinsicLayer) else target)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Note the parameters of `target_parameters`."""
        self._matched_names = targeted_parameters(model, peft_config, self._values)
        return self._matched_names

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """θ is created in float32. Without autocasting, cast it to the dtype of the base model."""
        if not autocast_adapter_dtype:
            self.vector.cast_to_base(adapter_name)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights: in all layers, or after an error in none.

        Args:
            adapter_names: the adapters to merge, by default the active ones.
            safe_merge: raise an error instead of merging values that are not finite.

        Raises:
            ValueError: an adapter is not attached; with `safe_merge`, a merged weight would not be finite; or a
                quantized weight cannot be merged.
        """
        layers = self.tuner_layers()
        merging = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        before = [list(layer.merged_adapters) for layer in merging]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except Exception:
            for layer, names in zip(merging, before, strict=True):
                with onload_layer(layer):
                    if layer.merged:
                        layer.unmerge()
                    if names:
                        layer.merge(adapter_names=names)
            raise
        lost, whole = (float(sum(layer.rounding[i] for layer in layers)) for i in (0, 1))
        preserved = 1 - math.sqrt(lost / whole) if whole else 1.0
        if preserved < MIN_PRESERVED:
            warnings.warn(
                f"Rounding to the base model's precision preserved {max(preserved, 0):.0%} of the offset's norm. Load "
                "the base in float32 before merging, or leave the adapter unmerged.",
                stacklevel=2,
            )

    def _check_merge_allowed(self) -> None:
        """Do not warn: tied weights share one offset, which is merged once."""

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Do not warn, as in `_check_merge_allowed`."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        elif not isinstance(child, IntrinsicParameters):  # these are removed last, all together
            unwrap(self.model, [child])

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        wanted = (adapter_names or self.active_adapters) if merge else ()
        flags, zeros = find_bias_flags(self.model, self._added_biases(wanted))
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
        for flag in flags:
            setattr(self.model.config, flag, True)
        if any(layer.merged for layer in self.tuner_layers()):
            clear_notes(self.model)
        else:
            restore_values(self.vector.replaced)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged|Already following adapters were merged")
            super()._unload_and_optionally_merge(merge, progressbar, adapter_names=adapter_names)
        unwrap(self.model, list(self.vector.in_place))
        remove_vector(self.model)
        for name in zeros:
            add_zero_bias(self.model.get_submodule(name.rpartition(".")[0]))
        return self.model

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose offset is exactly the weighted sum of the offsets of others, as P is linear.

        Args:
            adapters: names of attached adapters with the same projection (d, seed, block size, scale, targets).
            weights: a factor for each.
            adapter_name: of the new adapter.
            combination_type: `"linear"`, the only one.

        Raises:
            ValueError: the adapters have different projections or (SAID) different λ, so that no single θ is their sum;
                or a name, weight or the type is invalid.
        """
        if combination_type != "linear":
            raise ValueError(f"combination_type must be 'linear', which is exact here, got {combination_type!r}.")
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"adapters ({len(adapters)}) and weights ({len(weights)}) must be as many, at least one.")
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"weights={weights} must be finite.")
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"adapters={unknown} are not attached. Attached are {list(self.peft_config)}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} is taken. Delete that adapter or choose another name.")
        first = self.peft_config[adapters[0]]
        vector: Any = self.vector
        for name in adapters[1:]:
            if unlike := first.differences(self.peft_config[name]):
                raise ValueError(f"Adapters {adapters[0]!r} and {name!r} have no exact sum: they differ in {unlike}.")
            if first.said and not torch.equal(*(vector.intrinsic_lambda[n].weight for n in (adapters[0], name))):
                raise ValueError(
                    f"Adapters {adapters[0]!r} and {name!r} have different λ, so no θ gives the sum of their offsets "
                    "(said=True). Keep both active instead: set_adapter([…]) adds offsets."
                )
        for name in adapters:
            if beside := self.peft_config[name].trained_beside:
                raise ValueError(f"{beside} of adapter {name!r} cannot be combined. Train without it.")
        self.peft_config[adapter_name] = copy.copy(first)
        self.peft_config[adapter_name]._requested = {}  # with another projection the sum would be wrong
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        with torch.no_grad():
            total = sum(w * vector.intrinsic_theta[n].weight for n, w in zip(adapters, weights, strict=True))
            vector.intrinsic_theta[adapter_name].weight.copy_(total)
            if first.said:
                vector.intrinsic_lambda[adapter_name].weight.copy_(vector.intrinsic_lambda[adapters[0]].weight)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Apply `adapter_names`, one adapter for each sample of the batch."""
        if (offsets := kwargs.get("alora_offsets")) is not None:
            raise ValueError(f"alora_offsets={offsets!r} is only for activated LoRAs. Leave it out.")
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        batch = count_samples(self.model, {**{str(i): value for i, value in enumerate(args)}, **kwargs})
        with select_by_name(self, names, len(names) if batch is None else batch):
            yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        return vectors_to_save(config, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return vectors_to_load(model, config, adapter_name, state_dict)
