"""`IntrinsicModel`: attaches one θ to a model, and takes it off again."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..projection import PROJECTIONS, Spec, choose_block_size
from ..projection.randomness import normals, words
from .config import HEAD_NAMES, IntrinsicConfig
from .layer import IntrinsicLayer, Offset
from .operations import HOLDER, AdapterOperations
from .targets import (
    base_modules,
    canonical,
    check_manifest,
    foreign,
    fresh_parameters,
    lambda_groups,
    logical_shape,
    manifest,
    matrix_view,
    movable,
)
from .vector import IntrinsicVector
from .wrap import redraw, tuner_layers, unwrap

logger = logging.getLogger(__name__)


def _name_the_rest(model: nn.Module, users: Mapping[str, Any], config: IntrinsicConfig) -> None:
    """Say once which parameters stay still although every parameter was asked for."""
    if config.target_modules is not None or config.target_parameters:
        return
    sizes = {canonical(name): p.numel() for name, p in model.named_parameters() if not name.startswith(f"{HOLDER}.")}
    rest = [canonical(name) for name, p in model.named_parameters() if not p.is_floating_point()]
    if rest := [name for name in rest if name not in users]:
        share = sum(sizes[name] for name in rest) / sum(sizes.values())
        logger.warning("Not moved, as they hold no real numbers: %s (%.2g of all parameters).", ", ".join(rest), share)


class IntrinsicModel(AdapterOperations):
    """Moves the weights of a model along a fixed random projection of one trained vector θ.

    Use it through `get_peft_model(model, IntrinsicConfig(d=200))`. Reference: Aghajanyan et al. 2020, arXiv 2012.13255.
    """

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Attach an adapter.

        Raises:
            ValueError: nothing is targeted, d does not exceed the number of λ, d needs larger blocks, the model is not
                the one that a saved adapter was made for, or `state_dict` is given.
        """
        if state_dict is not None:
            raise ValueError(
                "An intrinsic adapter cannot be injected from a state_dict: its file holds θ alone and names no "
                "modules. Pass the saved configuration instead."
            )
        if not isinstance(getattr(model, HOLDER, None), IntrinsicVector | None):
            raise ValueError(f"The model already has an attribute {HOLDER!r}, which the adapter needs. Rename it.")
        # A copy: the user's configuration stays free for another model.
        config = self.peft_config[adapter_name] = copy.copy(cast(IntrinsicConfig, self.peft_config[adapter_name]))
        if config.manifest is None:
            config.redrawn = self._fresh(model, config)
            if config.redrawn:
                logger.warning(
                    "Not from the checkpoint, so drawn again from a fixed stream (head='keep' leaves it as it is): %s",
                    ", ".join(config.redrawn),
                )
        self._check_neighbours(model, adapter_name, config)
        config.head_modules = self._head(model, config)
        self._matched: list[tuple[nn.Module, list[str]]] = []
        if config.target_modules is None and not config.target_parameters:
            self._matched.append((model, movable(model)))  # PEFT visits every module but the root
        first = not hasattr(model, HOLDER)
        before = {parameter: parameter.requires_grad for parameter in model.parameters()}
        try:
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage
            )
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._attach(model, adapter_name, config)
        except Exception:
            self._detach(model, adapter_name)
            for parameter, trained in before.items():
                parameter.requires_grad_(trained)
            raise
        finally:
            self._matched = []
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if not first:  # other adapters stay trainable or frozen as they were
            for parameter, trained in before.items():
                parameter.requires_grad_(trained)

    def _check_neighbours(self, model: nn.Module, adapter_name: str, config: IntrinsicConfig) -> None:
        """Raises ValueError where attaching would change what another adapter relies on."""
        if not hasattr(model, HOLDER):
            return
        if adapter_name in self.vector.intrinsic_theta:
            raise ValueError(f"An adapter {adapter_name!r} is attached already. Delete it, or choose another name.")
        for name in self.vector.intrinsic_theta:
            known: Any = self.peft_config.get(name, config)
            drawn = set(config.redrawn or []) - set(known.redrawn or [])
            if drawn and not known.full_modules:
                raise ValueError(
                    f"{', '.join(sorted(drawn))} would be drawn again under adapter {name!r}, which was attached with "
                    "head='keep'. Pass head='keep' here too."
                )
        for module in config.full_modules or []:
            for key, layer in model.named_modules():
                if isinstance(layer, IntrinsicLayer) and (key == module or key.endswith(f".{module}")):
                    raise ValueError(
                        f"modules_to_save={config.full_modules}: {key} is already moved by another adapter. Attach "
                        "this adapter first, or attach the other one with head='keep'."
                    )

    @staticmethod
    def _fresh(model: nn.Module, config: IntrinsicConfig) -> list[str]:
        """What starts from the fixed stream: drawn at random by the library, neither loaded nor constant."""
        if config.head == "keep":
            return []
        parameters = {
            canonical(name): p
            for name, p in model.named_parameters()
            if not name.startswith(f"{HOLDER}.") and not foreign(name)
        }
        saved = config.full_modules or []
        return [
            name
            for name in fresh_parameters(parameters)
            if not any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved)
            and not parameters[name].is_meta  # offloaded: transformers' mark is lost, but it came from somewhere
            and parameters[name].unique().numel() > 1
        ]

    @staticmethod
    def _head(model: nn.Module, config: IntrinsicConfig) -> set[str]:
        """Names of the modules that are moved whatever `target_modules` says."""
        if config.head == "keep":
            return set()
        named = HEAD_NAMES.get(config.task_type or "", ())
        owners = {name.rpartition(".")[0] for name in config.redrawn or []}
        return owners | {key for key, _ in base_modules(model) if key.partition(".")[0] in named}

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        if key.partition(".")[0] == HOLDER or foreign(key):
            return False
        key = canonical(key)
        targets: Any = peft_config.target_modules
        if key in peft_config.head_modules or (targets is None and not peft_config.target_parameters):
            targets = [key.rpartition(".")[2]]
        view = SimpleNamespace(
            target_modules=targets,
            target_parameters=peft_config.target_parameters,
            exclude_modules=peft_config.exclude_modules,
            modules_to_save=peft_config.modules_to_save,
            layers_to_transform=None if key in peft_config.head_modules else peft_config.layers_to_transform,
            layers_pattern=peft_config.layers_pattern,
        )
        return check_target_module_exists(view, key)

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
        """Only note the match: the wrapping waits until all of the targeted parameters are known."""
        module = target.get_base_layer() if isinstance(target, IntrinsicLayer) else target
        self._matched.append((module, movable(module)))

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        names = []
        for key, module in base_modules(model):
            for name in movable(module):
                full = f"{key}.{name}" if key else name
                if any(full == target or full.endswith(f".{target}") for target in peft_config.target_parameters):
                    self._matched.append((module, [name]))
                    names.append(full)
        return names

    def _attach(self, model: nn.Module, adapter_name: str, config: IntrinsicConfig) -> None:
        """Give every user of a matched parameter its offset, and the holder this adapter's θ and λ."""
        wanted = {id(getattr(module, name)) for module, names in self._matched for name in names}
        users: dict[str, list[tuple[nn.Module, str]]] = {}  # canonical name → all modules that hold the parameter
        names: dict[int, str] = {}
        ties = (
            getattr(model, "all_tied_weights_keys", None) or {}
        )  # offloaded, tied parameters are no longer one object
        for key, module in base_modules(model):
            for name in movable(module):
                if id(parameter := getattr(module, name)) in wanted:
                    full = f"{key}.{name}" if key else name
                    first = names.setdefault(id(parameter), ties.get(full, full) if parameter.is_meta else full)
                    users.setdefault(first, []).append((module, name))
        if not users:
            raise ValueError(
                f"target_modules={config.target_modules!r} and target_parameters={config.target_parameters!r} matched "
                "no module with parameters of its own. Name linear layers, norms or embeddings, or pass None for all."
            )

        groups = lambda_groups(users, config.lambda_granularity) if config.said else {}
        count = len(set(groups.values()))
        if config.d <= count:
            raise ValueError(
                f"d={config.d} must exceed the number of λ, which is {count} with lambda_granularity="
                f"{config.lambda_granularity!r}. Use a larger d, a coarser granularity, or said=False."
            )
        forms = {name: logical_shape(*held[0]) for name, held in users.items()}
        shapes = {name: matrix_view(users[name][0][0], *form) for name, form in forms.items()}
        if config.manifest is None:
            config.manifest = manifest(shapes)
        check_manifest(config.manifest, shapes)
        length = config.d - count
        config.block_size = config.block_size or choose_block_size(length, shapes)
        spec = Spec(length, config.seed, config.block_size, config.scale)
        projections = PROJECTIONS[config.projection](spec, shapes)

        if not hasattr(model, HOLDER):
            setattr(model, HOLDER, IntrinsicVector(model))
            _name_the_rest(model, users, config)
        holder = cast(IntrinsicVector, model.get_submodule(HOLDER))
        layers = tuner_layers(model, holder, [module for held in users.values() for module, _ in held])
        merged: set[int] = set()
        for name, held in users.items():
            for module, own in held:
                merges = id(getattr(module, own)) not in merged
                merged.add(id(getattr(module, own)))
                offset = Offset(projections[name], *forms[name], groups.get(name), merges)
                layers[id(module)].offsets.setdefault(adapter_name, {})[own] = offset

        for name, held in users.items():
            if name in (config.redrawn or []):
                redraw(name, *held[0], getattr(model, "config", None))
        theta = np.zeros(length) if config.init_weights else normals(words(config.seed, "theta", "", length))
        first = getattr(*next(iter(users.values()))[0])
        holder.add(adapter_name, theta, np.ones(count), like=first, width=min(map(min, shapes.values())))

    def _detach(self, model: nn.Module, adapter_name: str) -> None:
        """Undo a failed injection."""
        for module in list(model.modules()):
            if isinstance(module, IntrinsicLayer):
                module.delete_adapter(adapter_name)
        unwrap(model, [m for m in model.modules() if isinstance(m, IntrinsicLayer) and not m.offsets])
        if hasattr(model, HOLDER) and not self.vector.intrinsic_theta:
            self.vector.guard.remove()
            delattr(model, HOLDER)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """θ is float32 from the start; without autocasting it takes the base model's dtype."""
        if not autocast_adapter_dtype:
            self.vector.cast_to_base(adapter_name)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config
