"""Packs an adapter of a model into bytes, and loads it from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model

from ..tuner import IntrinsicConfig
from ..tuner.base_model import base_digest, base_parameters
from ..tuner.head import explain_labels
from ..tuner.layer import find_adapter
from .packed import MAX_D, MAX_NAME, OPTIONS, PROJECTIONS, TASKS, PackedAdapter
from .quantize import MAX_LEVELS, check_levels, quantize

DEFAULT_LEVELS = 8

Source = bytes | bytearray | memoryview | str | os.PathLike
"""Bytes of a packed adapter, or the path of its file."""


def compress(
    model: Any,
    levels: int | None = None,
    *,
    max_bytes: int | None = None,
    max_error: float | None = None,
    adapter: str | None = None,
) -> bytes:
    """Pack an adapter: quantize θ to a few values (optimal k-means), and entropy-code it.

    Args:
        model: `PeftModel` with an intrinsic adapter that is not merged.
        levels: number of values of θ, 1 to 256; by default `DEFAULT_LEVELS`.
        max_bytes: size limit, instead of `levels`. θ gets as many values as fit.
        max_error: limit of the quantization error as a fraction of the norm of θ, instead of `levels`. θ gets as few
            values as meet it.
        adapter: name of the adapter; by default the active one.

    Returns:
        The bytes of the packed adapter (docs/packed_format.md). λ is in half precision.

    Raises:
        ValueError: several limits are passed, or one cannot be met; or the adapter is merged, trains more than θ and λ,
            or has an option that the format cannot hold.

    Example:
        >>> text = adapter_to_string(compress(model, levels=4))
        >>> model = load_packed(base, adapter_from_string(text))
    """
    if sum(limit is not None for limit in (levels, max_bytes, max_error)) > 1:
        raise ValueError(f"Pass only one of levels={levels}, max_bytes={max_bytes} and max_error={max_error}.")
    fields = _read_fields(model, adapter)
    low, high = 1, MAX_LEVELS
    if max_bytes is not None:  # find the most levels that fit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(_encode(fields, middle)) <= max_bytes else (low, middle - 1)
        if len(data := _encode(fields, low)) > max_bytes:
            raise ValueError(f"max_bytes={max_bytes} is too small: with one value the adapter has {len(data)} bytes.")
        return data
    if max_error is not None:  # find the fewest levels that meet the limit
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if _compute_error(fields["theta"], middle) <= max_error else (middle + 1, high)
        if (error := _compute_error(fields["theta"], low)) > max_error:
            raise ValueError(f"max_error={max_error} cannot be met: with {MAX_LEVELS} values the error is {error:.2g}.")
        return _encode(fields, low)
    return _encode(fields, check_levels(DEFAULT_LEVELS if levels is None else levels))


def _encode(fields: dict[str, Any], levels: int) -> bytes:
    return PackedAdapter(**{**fields, "theta": quantize(fields["theta"], levels)}).to_bytes()


def _compute_error(theta: np.ndarray, levels: int) -> float:
    norm = float(np.linalg.norm(theta))
    return float(np.linalg.norm(theta - quantize(theta, levels))) / norm if norm else 0.0


def check_trained(config: IntrinsicConfig) -> None:
    """Raise ValueError if an adapter trains more than θ and λ."""
    if config.trained_beside:
        raise ValueError(
            f"{config.trained_beside} is trained fully, and a packed adapter cannot hold it. Train with the head "
            "inside the d parameters, without this option."
        )


def _read_fields(model: Any, adapter: str | None) -> dict[str, Any]:
    """Read the fields of `PackedAdapter` from a model; θ is not quantized."""
    name = find_adapter(model, adapter)
    config: Any = model.peft_config[name]
    root = model.get_base_model()
    if not isinstance(config, IntrinsicConfig):
        raise ValueError(f"adapter={name!r} is a {type(config).__name__}; only an IntrinsicConfig can be packed.")
    check_trained(config)
    if config.projection not in PROJECTIONS or config.task_type not in TASKS or config.d > MAX_D:
        raise ValueError(
            f"d={config.d}, projection={config.projection!r} and task_type={config.task_type!r} cannot be packed: the "
            f"format has d ≤ {MAX_D}, projections {PROJECTIONS} and tasks {TASKS[1:]}."
        )
    names = sorted(base_parameters(root))
    reinitialized = config.reinitialized or []
    theta, scales = (
        vectors[name].weight.detach().cpu().float().numpy() if name in vectors else np.zeros(0, dtype=np.float32)
        for vectors in (root.intrinsic.intrinsic_theta, root.intrinsic.intrinsic_lambda)
    )
    if not (np.isfinite(theta).all() and np.isfinite(scales).all()):
        raise ValueError(f"adapter={name!r} has NaN or infinite parameters. Train it with a lower learning rate.")
    base = config.base_model_name_or_path or getattr(getattr(root, "config", None), "name_or_path", "") or ""
    return {
        "d": config.d,
        "seed": config.seed,
        "block_size": config.block_size,
        "options": {option: _to_json(getattr(config, option)) for option in OPTIONS},
        "base": (Path(base).name if os.path.isdir(base) else base).encode()[:MAX_NAME].decode(errors="ignore"),
        "classes": root.config.num_labels if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else 0,
        "base_digest": base_digest(root, reinitialized),
        "manifest_digest": bytes.fromhex(str(config.manifest).partition(":")[0]),
        "reinitialized": [i for i, parameter in enumerate(names) if parameter in reinitialized],
        "theta": theta,
        "scales": scales,
        "algorithm": config.algorithm_version,
    }


def _to_json(value: Any) -> Any:
    """Convert an option to JSON's types; sets are sorted."""
    if isinstance(value, set):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def load_packed(
    model: Any,
    source: Source,
    adapter_name: str = "default",
    check_base: bool = True,
) -> PeftModel:
    """Load a packed adapter onto its base model for inference, as `PeftModel.from_pretrained` loads a folder.

    Args:
        model: base model, or a `PeftModel` that gets one more adapter.
        source: bytes of the packed adapter, or the path of its file.
        adapter_name: name of the adapter in the model.
        check_base: raise an error if the base model has other weights. Pass False for a quantized base model.

    Returns:
        The `PeftModel`, in evaluation mode.

    Raises:
        ValueError: the bytes are damaged, or the base model is not the one that the adapter was made for.
    """
    packed = read_packed(source)
    root: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    names = list(base_parameters(root))
    config = make_config(packed, names)
    labels = explain_labels(config.num_labels, root, config.task_type)
    if labels and (check_base or config.head != "keep"):
        raise ValueError(labels)
    if check_base and base_digest(root, config.reinitialized or []) != packed.base_digest:
        dtypes = sorted({str(parameter.dtype) for parameter in root.parameters()} - {"torch.float32"})
        hint = f", or the same in {', '.join(dtypes)}, which rounds them: try torch.float32" if dtypes else ""
        raise ValueError(
            f"This adapter was made for {packed.base or 'a base model without a name'} (digest "
            f"{packed.base_digest.hex()}); this model has other weights{hint}. Load that model, with the class for its "
            "task. If it is the same model quantized, load_packed(…, check_base=False) loads it."
        )
    if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(root, "prepare_inputs_for_generation"):
        raise ValueError(f"This adapter needs a model for {config.task_type}, which {type(root).__name__} is not.")
    is_new = not isinstance(model, PeftModel)
    if is_new:
        model = get_peft_model(model, config, adapter_name)
    else:
        model.add_adapter(adapter_name, config)
    values = [torch.from_numpy(packed.theta), torch.from_numpy(packed.scales)]
    vectors = root.intrinsic.intrinsic_theta, root.intrinsic.intrinsic_lambda
    weights = [vector[adapter_name].weight if adapter_name in vector else values[1][:0] for vector in vectors]
    if (counts := [len(weight) for weight in weights]) != [len(value) for value in values]:
        if is_new:
            model.unload()
        else:
            model.delete_adapter(adapter_name)
        raise ValueError(
            f"This adapter has {len(values[0])} entries of θ and {len(values[1])} of λ, and this model needs "
            f"{counts[0]} and {counts[1]}. Load the model that it was made for."
        )
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)
    return model.eval()


def read_packed(source: Source) -> PackedAdapter:
    """Read the contents of a packed adapter, without a base model.

    Args:
        source: bytes of the packed adapter, or the path of its file.

    Raises:
        ValueError: the bytes are damaged.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return PackedAdapter.from_bytes(bytes(source))
    return PackedAdapter.from_bytes(Path(source).read_bytes())


def make_config(packed: PackedAdapter, names: list[str]) -> IntrinsicConfig:
    """Make the configuration of a packed adapter for a base model.

    Args:
        packed: the packed adapter.
        names: names of the base model's parameters.

    Raises:
        ValueError: the base model has too few parameters, or the options are damaged.
    """
    if packed.reinitialized and packed.reinitialized[-1] >= len(names):
        raise ValueError(
            f"This adapter was made for {packed.base}, which has more than the {len(names)} parameters of this model. "
            "Load that model, with the class for its task."
        )
    reinitialized = {sorted(names)[i] for i in packed.reinitialized}
    stored: dict[str, Any] = {
        "peft_type": "INTRINSIC",
        **{name: getattr(packed, name) for name in ("d", "seed", "block_size")},
        **packed.options,
        "reinitialized": [name for name in names if name in reinitialized],
        "manifest": packed.manifest_digest.hex(),
        "num_labels": packed.classes or None,
        "algorithm_version": packed.algorithm,
        "inference_mode": True,
    }
    try:
        return IntrinsicConfig(**stored)
    except TypeError as error:
        raise ValueError(f"This packed adapter is damaged: {error} Pack the adapter again.") from None
