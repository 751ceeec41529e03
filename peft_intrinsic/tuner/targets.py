"""Which parameters are moved, under which name and shape, and in which λ group."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..projection import Shapes
from .layer import IntrinsicLayer
from .modules import linear_features


def is_linear(module: nn.Module) -> bool:
    """A linear layer that the factored form fits, quantised ones included."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    return "Linear" in type(module).__name__ and hasattr(module, "in_features") and hasattr(module, "out_features")


def movable(module: nn.Module) -> list[str]:
    """Names of the parameters that sit directly on `module` and can get an offset."""
    if is_linear(module):
        return [name for name in ("weight", "bias") if getattr(module, name, None) is not None]
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.is_floating_point()]


def logical_shape(module: nn.Module, name: str) -> tuple[tuple[int, ...], bool]:
    """Shape of a parameter, unpacked where quantised, and whether its matrix view is transposed."""
    if name == "weight" and is_linear(module):
        cols, rows = linear_features(module)
        return ((cols, rows), True) if isinstance(module, Conv1D) else ((rows, cols), False)
    return tuple(getattr(module, name).shape), False


def matrix_view(module: nn.Module, shape: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    """(rows, cols) of the matrix that a parameter is seen as (definition: README of the projection)."""
    if transposed:
        return shape[1], shape[0]
    size = 1
    for extent in shape:
        size *= extent
    if len(shape) < 2:
        return size, 1
    if isinstance(module, nn.modules.conv._ConvNd):
        return shape[0], size // shape[0]
    return size // shape[-1], shape[-1]


def lambda_groups(names: Iterable[str], granularity: str) -> dict[str, int]:
    """Index of the λ of each parameter. `names` come in the order of the model."""
    labels = {}
    blocks_seen = False
    for name in names:
        block = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
        blocks_seen |= block is not None
        if granularity == "tensor":
            labels[name] = name
        elif granularity == "module":
            labels[name] = name.rpartition(".")[0]
        else:
            labels[name] = block[0] if block else "after" if blocks_seen else "before"
    index = {label: i for i, label in enumerate(dict.fromkeys(labels.values()))}
    return {name: index[label] for name, label in labels.items()}


def _marks(shapes: Shapes) -> dict[bytes, str]:
    lines = [f"{name} {rows}x{cols}" for name, (rows, cols) in sorted(shapes.items())]
    return {hashlib.sha256(line.encode()).digest()[:3]: line for line in lines}


def manifest(shapes: Shapes) -> str:
    """A digest of the targeted names and matrix shapes, with a mark of three bytes for each: `digest:marks`."""
    lines = "\n".join(f"{name} {rows}x{cols}" for name, (rows, cols) in sorted(shapes.items()))
    digest = hashlib.sha256(lines.encode()).hexdigest()[:16]
    return f"{digest}:{base64.b64encode(b''.join(sorted(_marks(shapes)))).decode()}"


def check_manifest(saved: str, shapes: Shapes) -> None:
    """Refuse an adapter that was made for other parameters.

    Raises:
        ValueError: names the parameters that the adapter does not know, and counts those that the model lacks.
    """
    if saved == manifest(shapes):
        return
    raw = base64.b64decode(saved.partition(":")[2])
    known = {raw[i : i + 3] for i in range(0, len(raw), 3)}
    marks = _marks(shapes)
    new = sorted(line for mark, line in marks.items() if mark not in known)
    lacking = len(known - set(marks))
    raise ValueError(
        f"This adapter was made for other parameters (digest {saved[:16]}, here {manifest(shapes)[:16]}): "
        f"{lacking} of its {len(known)} are not in this model under the same name and shape, and {len(new)} of the "
        f"model's {len(shapes)} are not in the adapter"
        + (f" ({', '.join(new[:5])}{', …' if len(new) > 5 else ''})" if new else "")
        + ". Load the base model, class and number of labels that the adapter was trained on. (A new adapter with the "
        "configuration of another: set its manifest, redrawn and block_size to None.)"
    )


def canonical(name: str) -> str:
    """A module or parameter name as it is in the plain base model."""
    return name.replace(".base_layer", "").replace(".original_module", "")


def foreign(name: str) -> bool:
    """Whether a module or parameter is another adapter's full copy (`modules_to_save`), not the base model's."""
    return ".modules_to_save." in f".{name}."


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model and their names in it, whatever adapters are already attached."""
    for name, module in model.named_modules():
        if not isinstance(module, IntrinsicLayer | AuxiliaryTrainingWrapper) and not foreign(name):
            yield canonical(name), module


def fresh_parameters(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Parameters that the checkpoint did not bring, in the order of the model.

    transformers marks what it loaded; in a model without any mark nothing is known to be fresh.
    """
    loaded = {name: getattr(p, "_is_hf_initialized", False) for name, p in parameters.items()}
    return [name for name, mark in loaded.items() if not mark] if any(loaded.values()) else []
