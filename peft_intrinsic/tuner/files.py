"""Saving and loading θ and λ. An adapter's file is untrusted input and may be damaged."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..projection.subspace import Subspace
from .base_model import base_modules
from .config import SAME, IntrinsicConfig
from .names import TOKENS, VECTOR, is_named
from .targets import token_rows

KEY_PARTS = ("base_model", "model", VECTOR, "intrinsic_theta", "intrinsic_lambda", "weight")
"""Parts of the keys of θ and λ, beside the name of the adapter."""

REMEDY = "File and configuration do not belong together, or the file is damaged: save the adapter again."


def _match_keys(adapter: str = "") -> re.Pattern[str]:
    """The pattern of the keys of θ and λ, in a model or (without the adapter's name) in a file."""
    return re.compile(rf"(?:^|\.){VECTOR}\.(intrinsic_\w+){re.escape(f'.{adapter}' if adapter else '')}\.weight$")


def checksum(config: IntrinsicConfig, vectors: Mapping[str, torch.Tensor]) -> str | None:
    """Checksum of θ, λ and all options that define their meaning; None if they are sharded or on the meta device."""
    meaning = [getattr(config, name) for name in (*SAME, "manifest", "reinitialized")]
    meaning += [config.subspace_digest] if config.subspace_digest else []
    meaning += [config.label_texts] if config.label_texts else []
    digest = hashlib.sha256(json.dumps(meaning).encode())
    for name, values in sorted(vectors.items()):
        if type(values) not in (torch.Tensor, nn.Parameter) or values.is_meta:
            return None
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def vectors_to_save(
    config: IntrinsicConfig, adapter: str, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Select θ and λ of an adapter from a model's state dict, and store their checksum for the configuration's file."""
    if config.embed_subspace and Subspace(str(config.subspace)).digest != config.subspace_digest:
        raise ValueError(
            f"subspace={config.subspace!r} has changed since the adapter was trained, so it cannot be embedded. "
            "Restore the file, or save with embed_subspace=False."
        )
    keys = _match_keys(adapter)
    if not any(map(keys.search, state)):  # the result of get_peft_model_state_dict
        keys = _match_keys()
    found = {name: (match[1], value) for name, value in state.items() if (match := keys.search(name))}
    if state:  # processes that do not write pass an empty one
        _check_saved(config, adapter, dict(found.values()))
    config.checksum_to_save = checksum(config, dict(found.values())) if found else None
    config.checksum = None  # that of the file it was loaded from is outdated
    return {name: value for name, (_, value) in found.items()}


def _check_saved(config: IntrinsicConfig, adapter: str, vectors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError if loading would fail on the file that is about to be written."""
    count = sum(values.numel() for values in vectors.values())
    if count != config.d:
        raise ValueError(
            f"The state dict contains {count} of the d={config.d} parameters of adapter {adapter!r}, so the file could "
            "not be loaded. Pass the state dict of the whole model."
        )
    for name, values in vectors.items():
        if not values.is_meta and not torch.isfinite(values).all():
            raise ValueError(
                f"{name} of adapter {adapter!r} contains NaN or infinite values, so the file could not be loaded. "
                "Nothing was written. Lower the learning rate, and continue from an earlier checkpoint."
            )


def check_adapter_names(model: nn.Module, configs: Mapping[str, Any], own: Iterable[str] = KEY_PARTS) -> None:
    """Check that PEFT will find all parts of every adapter when it saves it.

    PEFT leaves out each key that has the name of another adapter between two dots.

    Args:
        configs: the configurations of the attached adapters and the new one, by name.
        own: parts of the keys of the method's own parameters.

    Raises:
        ValueError: the name of an adapter is a part of such a key.
    """
    taken = set(own)
    for config in configs.values():
        beside = [*(config.full_modules or ()), *token_rows(model, config)]
        for key, module in base_modules(model) if beside else ():
            if is_named(beside, key):
                taken |= {"modules_to_save", "token_adapter", *TOKENS, *key.split(".")}
                taken |= {part for own in module.state_dict() for part in own.split(".")}
    if clash := sorted(taken & set(configs)):
        raise ValueError(
            f"adapter_name={clash[0]!r} is a part of the keys of adapter files, so PEFT would leave these keys out "
            "when it saves another adapter. Choose another name."
        )


def read_vectors(config: IntrinsicConfig, state: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Read θ (`[d − m]`), and λ (`[m]`) if there is one, from the contents of a file.

    Raises:
        ValueError: they are not those that were saved with this configuration. After the first check, or without a
            checksum, others can be loaded with the same configuration.
    """
    found = {match[1]: value for name, value in state.items() if (match := _match_keys().search(name))}
    _check_read(config, found)
    return [found[name] for name in ("intrinsic_theta", "intrinsic_lambda") if name in found]


def _check_read(config: IntrinsicConfig, found: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless these are the θ and λ that were saved with the configuration."""
    for name, values in found.items():
        if not values.is_floating_point():
            raise ValueError(f"{name}: the file contains {values.dtype}, not floating-point numbers. {REMEDY}")
        if not torch.isfinite(values).all():
            raise ValueError(f"{name}: the file contains NaN or infinite values. {REMEDY}")
    if found and config.checksum is not None and config.checksum != checksum(config, found):
        raise ValueError(
            f"These are not the parameters and options that were saved (checksum={config.checksum!r} in the file). "
            f"{REMEDY} If you changed them on purpose, remove the checksum from adapter_config.json."
        )
    config.checksum = None


def check_loaded(model: nn.Module, adapter: str, missing: Container[str]) -> None:
    """Check θ and λ that transformers has loaded, as `vectors_to_load` does for PEFT.

    Args:
        missing: names of the parameters that the file lacks.

    Raises:
        ValueError: the file does not contain the θ and λ that were saved with the configuration.
    """
    config = getattr(model, "peft_config", {}).get(adapter)
    if not isinstance(config, IntrinsicConfig):
        return
    keys = _match_keys(adapter)
    loaded = {name: (match[1], p) for name, p in model.named_parameters() if (match := keys.search(name))}
    if absent := [name for name in loaded if name in missing]:
        raise ValueError(f"The file does not contain {', '.join(absent)}. {REMEDY}")
    found = dict(loaded.values())
    for dtype in (torch.float16, torch.bfloat16):  # transformers loads half precision as float32
        rounded = {name: values.detach().to(dtype) for name, values in found.items()}
        if config.checksum is not None and config.checksum == checksum(config, rounded):
            config.checksum = None
    if checksum(config, found) is not None:  # not sharded
        _check_read(config, found)


def vectors_to_load(
    model: nn.Module, config: IntrinsicConfig, adapter: str, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rename the contents of a file to the names in the model.

    Raises:
        ValueError: the file does not contain exactly the θ and λ of the configuration.
    """
    expected = {
        match[1]: (name, parameter)
        for name, parameter in model.named_parameters()
        if (match := _match_keys(adapter).search(name))
    }
    names = {name: match[1] for name in state if (match := _match_keys().search(name))}
    if extra := sorted(name for name in state if "intrinsic_" in name and names.get(name) not in expected):
        raise ValueError(f"The file contains {extra}, which this adapter does not have. {REMEDY}")
    for own, (name, parameter) in expected.items():
        found = [tuple(state[key].shape) for key in names if names[key] == own]
        if found != [tuple(parameter.shape)]:
            raise ValueError(
                f"{name}: the file contains {found[0] if found else 'nothing'}, the configuration (d={config.d}, "
                f"said={config.said}) requires {tuple(parameter.shape)}. {REMEDY}"
            )
    read_vectors(config, state)
    return {expected[names[key]][0] if key in names else key: value for key, value in state.items()}
