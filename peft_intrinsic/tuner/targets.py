"""Which parameters are moved, under which name and shape, and in which λ group."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import re
from collections.abc import Iterable
from typing import Any

import regex
from peft.tuners.tuners_utils import _ExcludedModule
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers.pytorch_utils import Conv1D

from ..projection import Kind, Shape, Shapes

HOLDER = "intrinsic"
"""The attribute of the root that holds θ and λ."""

QUANTISED = (
    *("bitsandbytes", "hqq", "aqlm", "eetq", "gptqmodel", "awq", "vptq", "spqr_quant", "auto_round"),
    *("compressed_tensors", "optimum", "neural_compressor"),
)
"""Packages whose layers named …Linear… compute x·Wᵀ + b from weights that only they can read."""

KEYWORDS = ("vectors", "all")
"""Values of `target_modules` beside `"all-linear"` that are no regular expression."""

PATIENCE = 0.2
"""Seconds that a regular expression may take for one name: an adapter's configuration can come from a stranger."""


WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Under which names `torch.compile`, activation checkpointing and FSDP 1 hold the module that they wrap."""

PARALLEL = (nn.DataParallel, DistributedDataParallel, AveragedModel)
"""Wrappers that hold the module as `module`, a name that models use too."""

ADAPTED = ("base_layer", "original_module")
"""Under which names PEFT's layers hold the module that they wrap."""

TOKENS = ("trainable_tokens_delta", "trainable_tokens_original")
"""What `trainable_token_indices` adds to an embedding."""

LAYER = "_intrinsic_layer"
"""The attribute of a module whose parameters are moved in place that holds its tuner layer."""


def own_class(module: nn.Module) -> type:
    """The class of a module before its parameters were moved in place."""
    layer = module.__dict__.get(LAYER)
    return type(module) if layer is None else layer.kind


def is_linear(module: nn.Module) -> bool:
    """Whether the layer's own forward is known to compute x·Wᵀ + b.

    Plain layers, quantised tensors in plain layers (torchao), and the layers of known quantisation libraries. A
    subclass may compute anything from its weight (a router, a mask, a cosine), and so may a layer whose forward was
    replaced or whose weight is made by a hook (weight norm, pruning).
    """
    kind = own_class(module)
    if kind in (nn.Linear, Conv1D, nn.modules.linear.NonDynamicallyQuantizableLinear):
        replaced = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")  # accelerate calls the layer's own
        return not replaced and "weight" in module._parameters
    known = kind.__module__.partition(".")[0] in QUANTISED or kind.__module__.startswith("transformers.integrations.")
    return known and "Linear" in kind.__name__ and hasattr(module, "in_features") and hasattr(module, "out_features")


def is_embedding(module: nn.Module) -> bool:
    """Whether the layer's own forward is known to look rows up, and at most to scale them."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None or "forward" in module.__dict__:
        return False
    kind = own_class(module)
    scaled = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("ScaledWordEmbedding")
    return (kind is nn.Embedding or scaled) and "weight" in module._parameters


def is_norm(module: nn.Module) -> bool:
    """Whether the module multiplies and adds its parameters along the last axis."""
    kind = own_class(module)
    if kind in (nn.LayerNorm, nn.RMSNorm):
        return len(module.normalized_shape) == 1  # type: ignore[arg-type]
    named = "RMSNorm" in kind.__name__ or kind.__name__.endswith("LayerNorm")
    return named and not isinstance(module, nn.LayerNorm) and all(p.dim() == 1 for p in module.parameters())


def linear_features(layer: Any) -> tuple[int, int]:
    """(in, out) features of a linear layer, plain, Conv1D or quantised."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    nx, nf = layer.weight.shape  # Conv1D stores [in, out]
    return nx, nf


def movable(module: nn.Module) -> list[str]:
    """Names of the parameters that sit directly on `module` and can get an offset."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    real = [name for name, p in own.items() if p.is_floating_point() and p.element_size() > 1]
    return ["weight", *(name for name in real if name == "bias")] if is_linear(module) else real


def output_module(model: Any) -> str | None:
    """Name of the module that turns hidden states into words, as transformers knows it."""
    try:
        output = getattr(model, "get_output_embeddings", lambda: None)()
    except NotImplementedError:  # its inner model is wrapped
        return None
    return next((canonical(name, model) for name, module in model.named_modules() if module is output), None)


def candidates(config: Any, key: str, module: nn.Module) -> list[str]:
    """What `movable` names, and the bias that a linear layer lacks, where the configuration adds it."""
    bare = config.add_bias and is_linear(module) and getattr(module, "bias", None) is None
    added = bare and key not in config.head_modules and key != config.output_module
    return [*movable(module), "bias"] if added else movable(module)


def logical_shape(module: nn.Module, name: str) -> tuple[tuple[int, ...], bool]:
    """Shape of a parameter, unpacked where quantised, and whether its matrix view is transposed."""
    if name == "weight" and is_linear(module):
        cols, rows = linear_features(module)
        return ((cols, rows), True) if isinstance(module, Conv1D) else ((rows, cols), False)
    if dict(module._parameters).get(name) is None:  # an added bias; scripted modules hold no dictionary
        return (linear_features(module)[1],), False
    return tuple(module._parameters[name].shape), False  # type: ignore[union-attr]


def is_vector(module: nn.Module, name: str) -> bool:
    """Whether a parameter has one axis at most: a bias, or the weight of a norm."""
    return len(logical_shape(module, name)[0]) < 2


def chosen(config: Any, key: str, module: nn.Module) -> list[str]:
    """Which parameters of a targeted module are moved: under `"vectors"` only vectors, but all of the head."""
    whole = config.target_modules != "vectors" or key in config.head_modules
    found = [name for name in candidates(config, key, module) if whole or is_vector(module, name)]
    return found if key else [name for name in found if targeted(config, name) and not excluded(config, name)]


def matrix_view(module: nn.Module, name: str, head: bool = False) -> Shape:
    """The matrix that a parameter is seen as, and its kind (definition: README of the projection).

    Args:
        module: that holds it.
        name: of the parameter there.
        head: whether the module belongs to the task's head.
    """
    shape, transposed = logical_shape(module, name)
    size = math.prod(shape)
    if len(shape) < 2:
        return Shape(size, 1, "norm" if is_norm(module) else "bias")
    cols = shape[0] if transposed else shape[-1]
    if isinstance(module, nn.modules.conv._ConvNd):
        cols = size // shape[0]
    kind: Kind = "head" if head else "embedding" if isinstance(module, nn.Embedding) else "matrix"
    return Shape(size // cols, cols, kind, transposed)


def block_of(name: str) -> str | None:
    """The numbered block that a parameter lies in, the outermost one, such as `encoder.layer.3`."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return found and found[0]


def kind_of(name: str) -> str:
    """A parameter's name within its numbered block."""
    return name.removeprefix(f"{block_of(name)}.")


def lambda_groups(names: Iterable[str], granularity: str) -> dict[str, int]:
    """Index of the λ of each parameter. `names` come in the order of the model."""
    labels = {}
    blocks_seen = False
    for name in names:
        block = block_of(name)
        blocks_seen |= block is not None
        if granularity == "tensor":
            labels[name] = name
        elif granularity == "module":
            labels[name] = name.rpartition(".")[0]
        else:
            labels[name] = block or ("after" if blocks_seen else "before")
    index = {label: i for i, label in enumerate(dict.fromkeys(labels.values()))}
    return {name: index[label] for name, label in labels.items()}


def fits(option: str, pattern: str, key: str) -> bool:
    """Whether a regular expression matches the whole of a name.

    Raises:
        ValueError: it takes longer than `PATIENCE`, or is none to `regex`, which asks for more than `re`.
    """
    try:
        return regex.fullmatch(pattern, key, timeout=PATIENCE) is not None
    except TimeoutError:
        raise ValueError(f"{option}={pattern!r} takes too long to match {key!r}. Use a simpler expression.") from None
    except regex.error as error:
        raise ValueError(f"{option}={pattern!r} is not a regular expression: {error}.") from None


def named(names: Iterable[str], key: str) -> bool:
    """Whether a name is among `names` or ends with one of them, as in LoRA."""
    return any(key == name or key.endswith(f".{name}") for name in names)


def inside(modules: Iterable[str], key: str) -> bool:
    """Whether a module or parameter is one of `modules`, or lies in one."""
    return any(f".{module}." in f".{key}." for module in modules)


def excluded(config: Any, key: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` keeps a module where it is."""
    left_out = config.exclude_modules or ()
    if isinstance(left_out, str) and fits("exclude_modules", left_out, key):
        return True
    return (not isinstance(left_out, str) and named(left_out, key)) or inside(config.full_modules or (), key)


def targeted(config: Any, key: str) -> bool:
    """Whether `target_modules`, `layers_to_transform` and `layers_pattern` choose a module, as in LoRA.

    Raises:
        ValueError: a regular expression takes too long.
    """
    targets = config.target_modules
    if targets in KEYWORDS:
        targets = None
    if isinstance(targets, str):
        return fits("target_modules", targets, key)
    if targets is None and config.target_parameters:
        return False
    if targets is not None and not named(map(canonical, targets), key):  # "all-linear" lists names with wrappers' parts
        return False
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    for pattern in patterns or [r"[^.]*"]:
        # The first number is the layer's; experts inside it have numbers of their own.
        for index in re.finditer(r"\.(\d+)\.", key):
            path = key[: index.start()]
            if fits("layers_pattern", rf"(?:.*\.)?(?:{pattern})", path):
                return int(index[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def matched(config: Any, key: str, model: nn.Module) -> Any:
    """Whether a configuration chooses a module, as PEFT asks it: true, false, or its mark of an excluded module.

    Raises:
        ValueError: a regular expression takes too long.
    """
    if foreign(key):
        return False
    key = canonical(key, model)
    return _ExcludedModule() if excluded(config, key) else targeted(config, key)


def _marks(shapes: Shapes) -> dict[bytes, str]:
    lines = [f"{name} {s.rows}x{s.cols} {s.kind}" for name, s in sorted(shapes.items())]
    return {hashlib.sha256(line.encode()).digest()[:3]: line for line in lines}


def manifest(shapes: Shapes) -> str:
    """A digest of the targeted names and matrix shapes, with a mark of three bytes for each: `digest:marks`."""
    marks = _marks(shapes)
    digest = hashlib.sha256("\n".join(marks.values()).encode()).hexdigest()[:16]
    return f"{digest}:{base64.b64encode(b''.join(sorted(marks))).decode()}"


def check_manifest(saved: str, shapes: Shapes) -> None:
    """Refuse an adapter that was made for other parameters. A packed adapter has the digest alone.

    Raises:
        ValueError: names the parameters that the adapter does not know, and counts those that the model lacks.
    """
    here = manifest(shapes)
    digest, colon, listed = saved.partition(":")
    if saved == here or (not colon and digest == here.partition(":")[0]):
        return
    try:
        raw = base64.b64decode(listed, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(
            f"manifest={saved[:40]!r} is damaged: it must be digest:marks. Save the adapter again."
        ) from None
    known = {raw[i : i + 3] for i in range(0, len(raw), 3)}
    marks = _marks(shapes)
    new = sorted(line for mark, line in marks.items() if mark not in known)
    lacking = len(known - set(marks))
    told = (
        f": {lacking} of its {len(known)} are not in this model under the same name and shape, and {len(new)} of the "
        f"model's {len(shapes)} are not in the adapter"
        + (f" ({', '.join(new[:5])}{', …' if len(new) > 5 else ''})" if new else "")
    )
    raise ValueError(
        f"This adapter was made for other parameters (digest {digest[:16]}, here {here[:16]}){told if colon else ''}. "
        "Load the base model, class and number of labels that the adapter was trained on. (A new adapter with the "
        "configuration of another: set its manifest, redrawn and block_size to None.)"
    )


def canonical(name: str, model: nn.Module | None = None) -> str:
    """A module or parameter name as it is in the plain base model, without what wrappers add to it.

    Args:
        name: of a module or parameter of `model`.
        model: tells a data-parallel wrapper's `module` from a module that is called so.
    """
    parts = name.split(".")
    kept = []
    for i, part in enumerate(parts):
        if part in WRAPPED or (i and part in ADAPTED) or parts[i : i + 2] == ["token_adapter", "base_layer"]:
            continue
        if part == "module" and model and isinstance(model.get_submodule(".".join(parts[:i])), PARALLEL):
            continue
        kept.append(part)
    return ".".join(kept)


def foreign(name: str) -> bool:
    """Whether a module or parameter belongs to an adapter of another kind, not to the base model."""
    return any(f".{part}." in f".{name}." for part in ("modules_to_save", *TOKENS))
