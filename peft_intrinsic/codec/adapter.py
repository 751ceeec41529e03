"""An adapter of a model as bytes, and back onto the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model

from ..tuner import IntrinsicConfig
from ..tuner.base_model import base_digest, base_places
from ..tuner.labels import other_labels
from ..tuner.layer import attached
from .packed import NAME, NUMBERS, OPTIONS, PROJECTIONS, TASKS, Packed
from .quantize import LEVELS, check_levels, rounded

DEFAULT_LEVELS = 8

Source = bytes | bytearray | memoryview | str | os.PathLike
"""The bytes of a packed adapter, or its file."""


def compress(
    model: Any,
    levels: int | None = None,
    *,
    max_bytes: int | None = None,
    max_error: float | None = None,
    adapter: str | None = None,
) -> bytes:
    """An adapter in few bytes: θ rounded to a few values (optimal k-means) and entropy-coded.

    Args:
        model: a `PeftModel` with an intrinsic adapter, not merged.
        levels: how many values θ may use, 1 to 256; by default `DEFAULT_LEVELS`.
        max_bytes: instead: about as many as fit into so many bytes.
        max_error: instead: as few as keep the norm of what rounding changes at most at this share of the norm of θ.
        adapter: its name, by default the active one.

    Returns:
        The packed adapter, format version 1 (docs/packed_format.md). λ is kept in half precision.

    Raises:
        ValueError: more than one of the three limits, or one that cannot be kept; `modules_to_save`, which no such file
            holds; an adapter that is merged or cannot be packed.
    """
    if sum(limit is not None for limit in (levels, max_bytes, max_error)) > 1:
        raise ValueError(f"Give one of levels={levels}, max_bytes={max_bytes} and max_error={max_error}.")
    whole = _taken(model, adapter)
    low, high = 1, LEVELS
    if max_bytes is not None:  # the most that fit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(_packed(whole, middle)) <= max_bytes else (low, middle - 1)
        if len(found := _packed(whole, low)) > max_bytes:
            raise ValueError(f"max_bytes={max_bytes} is too few: with a single value the adapter has {len(found)}.")
        return found
    if max_error is not None:  # the fewest that are good enough
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if _error(whole["theta"], middle) <= max_error else (middle + 1, high)
        if (error := _error(whole["theta"], low)) > max_error:
            raise ValueError(f"max_error={max_error} cannot be kept: {LEVELS} values still leave {error:.2g}.")
        return _packed(whole, low)
    return _packed(whole, check_levels(DEFAULT_LEVELS if levels is None else levels))


def _packed(whole: dict[str, Any], levels: int) -> bytes:
    return Packed(**{**whole, "theta": rounded(whole["theta"], levels)}).to_bytes()


def _error(theta: np.ndarray, levels: int) -> float:
    norm = float(np.linalg.norm(theta))
    return float(np.linalg.norm(theta - rounded(theta, levels))) / norm if norm else 0.0


def _taken(model: Any, adapter: str | None) -> dict[str, Any]:
    """The fields of `Packed`, θ not yet rounded."""
    name = attached(model, adapter)
    config: Any = model.peft_config[name]
    root = model.get_base_model()
    if not isinstance(config, IntrinsicConfig):
        raise ValueError(f"adapter={name!r} is a {type(config).__name__}; only an IntrinsicConfig can be packed.")
    if config.trained_beside:
        raise ValueError(
            f"{config.trained_beside} is trained in full and has no place in a packed adapter. Train with the head "
            "inside the d parameters, without this option."
        )
    if config.projection not in PROJECTIONS or config.task_type not in TASKS or config.d > NUMBERS:
        raise ValueError(
            f"d={config.d}, projection={config.projection!r} and task_type={config.task_type!r} cannot be packed: at "
            f"most {NUMBERS} numbers, projections {PROJECTIONS}, tasks {TASKS[1:]}."
        )
    names = sorted(base_places(root))
    reinitialized = config.reinitialized or []
    theta, scales = (
        vectors[name].weight.detach().cpu().float().numpy() if name in vectors else np.zeros(0, dtype=np.float32)
        for vectors in (root.intrinsic.intrinsic_theta, root.intrinsic.intrinsic_lambda)
    )
    if not (np.isfinite(theta).all() and np.isfinite(scales).all()):
        raise ValueError(f"adapter={name!r} holds NaN or infinite numbers. Train it again.")
    place = config.base_model_name_or_path or getattr(getattr(root, "config", None), "name_or_path", "") or ""
    return {
        "d": config.d,
        "seed": config.seed,
        "block_size": config.block_size,
        "options": {option: _plain(getattr(config, option)) for option in OPTIONS},
        "base": (Path(place).name if os.path.isdir(place) else place).encode()[:NAME].decode(errors="ignore"),
        "classes": root.config.num_labels if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else 0,
        "base_digest": base_digest(root, reinitialized),
        "manifest_digest": bytes.fromhex(str(config.manifest).partition(":")[0]),
        "reinitialized": [i for i, parameter in enumerate(names) if parameter in reinitialized],
        "theta": theta,
        "scales": scales,
        "algorithm": config.algorithm_version,
    }


def _plain(value: Any) -> Any:
    """An option as JSON has it, and without order where it has none."""
    if isinstance(value, set):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def load_packed(
    model: Any,
    source: Source,
    adapter_name: str = "default",
    check_base: bool = True,
) -> PeftModel:
    """Put a packed adapter onto its base model, ready to use: as `PeftModel.from_pretrained` does with a folder.

    Args:
        model: the base model, or a `PeftModel` that gets one more adapter.
        source: the bytes, or a file that holds them.
        adapter_name: its name in the model.
        check_base: refuse a base model with other weights. False is for the same model quantised.

    Raises:
        ValueError: the bytes are damaged, or the base model is not the one that the adapter was made for.
    """
    packed = read_packed(source)
    root: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    names = list(base_places(root))
    config = _config(packed, names)
    labels = other_labels(config.num_labels, root, config.task_type)
    if labels and (check_base or config.head == "subspace"):
        raise ValueError(labels)
    if check_base and base_digest(root, config.reinitialized or []) != packed.base_digest:
        dtypes = sorted({str(parameter.dtype) for parameter in root.parameters()} - {"torch.float32"})
        hint = f", or the same in {', '.join(dtypes)}, which rounds them: try torch.float32" if dtypes else ""
        raise ValueError(
            f"This adapter was made for {packed.base or 'a base model without a name'} (digest "
            f"{packed.base_digest.hex()}); the weights of this model are others{hint}. Load that model, with the "
            "class for its task. For the same model quantised: check_base=False."
        )
    if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(root, "prepare_inputs_for_generation"):
        raise ValueError(f"This adapter is of a {config.task_type} model, which {type(root).__name__} is not.")
    first = not isinstance(model, PeftModel)
    if first:
        model = get_peft_model(model, config, adapter_name)
    else:
        model.add_adapter(adapter_name, config)
    vectors = root.intrinsic.intrinsic_theta, root.intrinsic.intrinsic_lambda
    numbers = [torch.from_numpy(numbers) for numbers in (packed.theta, packed.scales)]
    held = [of[adapter_name].weight if adapter_name in of else numbers[1][:0] for of in vectors]
    if (counts := [len(weight) for weight in held]) != [len(values) for values in numbers]:
        if first:
            model.unload()
        else:
            model.delete_adapter(adapter_name)
        raise ValueError(
            f"This adapter has {len(numbers[0])} numbers and {len(numbers[1])} λ; on this model it would have "
            f"{counts[0]} and {counts[1]}. Load the model that it was made for."
        )
    with torch.no_grad():
        for weight, values in zip(held, numbers, strict=True):
            weight.copy_(values)
    return model.eval()


def read_packed(source: Source) -> Packed:
    """What a packed adapter holds, from its bytes or its file.

    Raises:
        ValueError: it is damaged.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return Packed.from_bytes(bytes(source))
    return Packed.from_bytes(Path(source).read_bytes())


def _config(packed: Packed, names: list[str]) -> IntrinsicConfig:
    """The configuration, for a base model with parameters of these names."""
    if packed.reinitialized and packed.reinitialized[-1] >= len(names):
        raise ValueError(
            f"This adapter was made for {packed.base}, which has more parameters than the {len(names)} of this model. "
            "Load that model, with the class for its task."
        )
    drawn = {sorted(names)[i] for i in packed.reinitialized}
    try:
        return IntrinsicConfig(
            d=packed.d,
            seed=packed.seed,
            block_size=packed.block_size,
            **packed.options,
            reinitialized=[name for name in names if name in drawn],
            manifest=packed.manifest_digest.hex(),
            num_labels=packed.classes or None,
            algorithm_version=packed.algorithm,
            inference_mode=True,
        )
    except TypeError as error:
        raise ValueError(f"This packed adapter is damaged: {error} Pack the adapter again.") from None
