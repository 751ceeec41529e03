"""Which parameters an adapter adapts, and which rows of embeddings are fully trained beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import _ExcludedModule
from peft.utils import TaskType
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from ..projection import BLOCK_SIZE, OF_VALUES, Shapes, Spec, ValueBias
from .base_model import base_modules
from .manifest import check_manifest
from .module_types import adaptable_names, is_linear, is_vector, logical_shape, matrix_view
from .names import KEYWORDS, block_of, canonical, is_foreign, is_inside, is_match, is_named

HEAD_NAMES: dict[str, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""Names of task heads in transformers models."""

MAX_RANDOM_NUMBERS = 2**22
"""Random numbers that every projection may store (16 MiB); larger ones: at most 16 for each adapted weight."""

MIN_LAYERS = 8
"""The fewest layers that value biases adapt by default."""

LAMBDA_SCALE = {"fan_in": 256, "isometric": 1}
"""λ is stored divided by this: under `fan_in` a λ of 1 is 1/256, so that it trains at the learning rate of θ."""


Users = Mapping[str, list[tuple[nn.Module, str]]]
"""The modules that have a parameter (several if it is tied) and its name in each, by its name in the plain model."""


@dataclass(frozen=True)
class Targeting:
    """The parameters that an adapter adapts, in the order of the model, and the projection for them.

    Args:
        users: the modules that have them.
        shapes: their matrix views.
        groups: the index of the λ of each; empty without λ.
        spec: of the projection.
    """

    users: Users
    shapes: Shapes
    groups: Mapping[str, int]
    spec: Spec


def is_head(config: Any, key: str) -> bool:
    """Whether a module belongs to the task head, which P adapts whatever `target_modules` selects."""
    if config.head == "keep" or config.projection == "trajectory":  # a subspace file lists its parameters
        return False
    names = HEAD_NAMES.get(config.task_type or "", ())
    return key.partition(".")[0] in names or any(name.rpartition(".")[0] == key for name in config.reinitialized or ())


def is_excluded(config: Any, key: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` names a module."""
    names = config.exclude_modules or ()
    excluded = is_match("exclude_modules", names, key) if isinstance(names, str) else is_named(names, key)
    return excluded or is_inside(config.full_modules or (), key)


def is_targeted(config: Any, key: str) -> bool:
    """Whether `target_modules`, `layers_to_transform` and `layers_pattern` select a module, as in LoRA."""
    targets = config.target_modules
    if targets in KEYWORDS:
        targets = None
    if isinstance(targets, str):
        return is_match("target_modules", targets, key)
    if targets is None and config.target_parameters:
        return False
    # The names that PEFT lists for "all-linear" contain parts of wrappers.
    if targets is not None and not is_named(map(canonical, targets), key):
        return False
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    for pattern in patterns or [r"[^.]*"]:
        # The first number is the layer's; experts inside it are numbered too.
        for index in re.finditer(r"\.(\d+)\.", key):
            path = key[: index.start()]
            if is_match("layers_pattern", rf"(?:.*\.)?(?:{pattern})", path):
                return int(index[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def match_module(config: Any, key: str, model: nn.Module) -> Any:
    """Answer PEFT whether a configuration targets a module: True, False, or PEFT's mark of an excluded one."""
    if is_foreign(key):
        return False
    key = canonical(key, model)
    return _ExcludedModule() if is_excluded(config, key) else is_targeted(config, key)


def adaptable_parameters(
    model: nn.Module, config: Any, values: Mapping[str, ValueBias] | None = None
) -> Iterator[tuple[str, nn.Module, str]]:
    """Name of the module, module and name in it of every parameter that can get an offset.

    With `add_bias`, biases that linear layers lack are among them. `"value_bias"` and `"value_lora"` adapt the
    parameters `values` and the head.
    """
    output = output_embeddings(model) if config.add_bias else None
    for key, module in base_modules(model):
        names = adaptable_names(module)
        if config.projection in OF_VALUES and not is_head(config, key):
            names = [own for own in ("weight", "bias") if _join(key, own) in (values or ())]
        if config.add_bias and is_linear(module) and getattr(module, "bias", None) is None:
            names = names if is_head(config, key) or key == output else [*names, "bias"]
        for own in names:
            yield key, module, own


def output_embeddings(model: Any) -> str | None:
    """Name of the module that turns hidden states into tokens, as transformers knows it."""
    try:
        output = getattr(model, "get_output_embeddings", lambda: None)()
    except NotImplementedError:  # its inner model is wrapped
        return None
    return next((canonical(name, model) for name, module in model.named_modules() if module is output), None)


def _is_chosen(config: Any, key: str, module: nn.Module, own: str, targets: Any) -> bool:
    """Whether a parameter of a targeted module is adapted. Parameters of the root are selected by their own names."""
    if targets == "norms-and-biases" and not is_head(config, key) and not is_vector(module, own):
        return False
    return bool(key) or (is_targeted(config, own) and not is_excluded(config, own))


def targeted_parameters(model: nn.Module, config: Any, values: Mapping[str, ValueBias]) -> list[str]:
    """Names of the parameters that `target_parameters` selects: by suffix, as in LoRA; by whole name for a subspace."""
    names, exact = config.target_parameters, config.projection == "trajectory"
    adaptable = [
        _join(key, own)
        for key, _, own in adaptable_parameters(model, config, values)
        if config.manifest is not None or not is_excluded(config, key)
    ]
    return [name for name in adaptable if (name in names if exact else is_named(names, name))]


def default_projection(model: Any, config: Any, values: Mapping[str, ValueBias]) -> str:
    """The value for `projection=None`: biases of values for decoders, which learn most from them (docs/defaults.md).

    Every layer of the decoder must have known values, and no other part of the model may have any.
    """
    names = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "block_size", "manifest")
    selected = config.said or config.add_bias or any(getattr(config, name) is not None for name in names)
    settings: Any = getattr(model, "config", None)
    if selected or config.task_type not in (None, TaskType.CAUSAL_LM) or not hasattr(settings, "get_text_config"):
        return "fastfood"
    generates = getattr(model, "can_generate", lambda: False)() and not settings.is_encoder_decoder
    modalities = getattr(settings, "sub_configs", None) or settings.get_text_config() is not settings
    if not generates or modalities or len(values) != getattr(settings, "num_hidden_layers", None):
        return "fastfood"
    decoder = set(getattr(model, "get_decoder", lambda: model)().modules())
    known = {key: module for key, module in base_modules(model) if _join(key, "bias") in values}
    sizes = {
        identify(module, "bias"): values[_join(key, "bias")].size
        for key, module in known.items()
        if not is_excluded(config, key)
    }
    fits = decoder.issuperset(known.values()) and config.d <= sum(sizes.values())
    return "value_bias" if fits else "fastfood"


def default_targets(model: nn.Module, config: Any) -> str:
    """The value for `target_modules=None`: norms, biases and head, or all where those have fewer than d weights.

    It is also all under `"value_bias"` and `"value_lora"`, which adapt no other parameters than those of value
    projections and the head.
    """
    if config.projection in OF_VALUES:
        return "all"
    sizes = {
        identify(module, own): math.prod(logical_shape(module, own)[0])
        for key, module, own in adaptable_parameters(model, config)
        if not is_excluded(config, key) and (is_head(config, key) or is_targeted(config, key))
        if _is_chosen(config, key, module, own, "norms-and-biases")
    }
    return "norms-and-biases" if config.d <= sum(sizes.values()) else "all"


def default_layers(model: Any, config: Any, values: Mapping[str, ValueBias]) -> list[int] | None:
    """The value for `layers_to_transform=None` under `"value_bias"`: √d layers, at least eight, or None for all.

    Few parameters learn most in the layers that follow the first two fifths (docs/defaults.md).
    """
    blocks = [int(block.rpartition(".")[2]) for name in values if (block := block_of(name))]
    count, wanted = len(blocks), max(MIN_LAYERS, math.isqrt(config.d))
    known = blocks == list(range(count)) and count == getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if config.task_type not in (None, TaskType.CAUSAL_LM) or config.exclude_modules or config.full_modules or not known:
        return None
    first = min(2 * count // 5, count - wanted)
    chosen = list(range(first, first + wanted))
    sizes = [value.size for value in values.values()]
    return chosen if wanted < count and config.d <= sum(sizes[i] for i in chosen) else None


def outermost_modules(model: nn.Module, config: Any) -> Any:
    """`modules_to_save`, spelled out where a name fits a module and others inside it, such as BERT's embeddings.

    PEFT compares ends of names. It would copy the inner modules within the copy of the outer one, and could not load
    what it saves.

    Raises:
        ValueError: the outer module's whole name is the end of an inner one's.
    """
    names = config.full_modules or ()
    keys = [key for key, _ in base_modules(model) if key and key.endswith(tuple(names))] if names else []
    outer = [key for key in keys if not any(key.startswith(f"{other}.") for other in keys)]
    if len(outer) == len(keys):
        return config.modules_to_save
    if again := [key for key in keys if key not in outer and key.endswith(tuple(outer))]:
        raise ValueError(
            f"modules_to_save={list(names)} fits {', '.join(outer)} and {', '.join(again)} inside. Name the inner "
            "modules."
        )
    return outer


def find_targets(
    model: nn.Module,
    config: Any,
    modules: Container[nn.Module],
    names: Container[str],
    values: Mapping[str, ValueBias],
) -> Targeting:
    """Find the parameters of targeted modules and single ones, in all modules that have them.

    Raises:
        ValueError: nothing is targeted, or a parameter that cannot get an offset; d does not exceed the number of λ, or
            exceeds the number of weights; the projection is out of proportion to the model; or the model is not the
            one that a saved adapter was trained on.
    """
    adaptable = list(adaptable_parameters(model, config, values))
    wanted = {
        identify(module, own)
        for key, module, own in adaptable
        if _join(key, own) in names
        or (module in modules and _is_chosen(config, key, module, own, config.target_modules))
    }
    adaptable = [each for each in adaptable if identify(each[1], each[2]) in wanted]
    scripted = {identify(module, own) for _, module, own in adaptable if isinstance(module, torch.jit.ScriptModule)}
    if scripted:
        keys = list(dict.fromkeys(key for key, module, own in adaptable if identify(module, own) in scripted))
        raise ValueError(
            f"{', '.join(keys)}: a scripted or traced module reads its parameters in compiled code, so they cannot get "
            f"an offset. Leave them out: exclude_modules={keys}. Or script the model after merging the adapter."
        )
    ties = getattr(model, "all_tied_weights_keys", None) or {}  # offloaded, tied parameters are no longer one object
    first: dict[Any, str] = {}
    users: dict[str, list[tuple[nn.Module, str]]] = {}
    for key, module, own in adaptable:
        name, parameter = _join(key, own), module._parameters.get(own)
        offloaded = parameter is not None and parameter.is_meta
        name = first.setdefault(identify(module, own), ties.get(name, name) if offloaded else name)
        users.setdefault(name, []).append((module, own))
    if config.projection in OF_VALUES and not values.keys() & users:
        raise ValueError(
            f"projection={config.projection!r} adapts the value projections of attention layers. Of those that it "
            f"knows, {type(model).__name__} has {len(values)}, and target_modules={config.target_modules!r} selects "
            "none. Select some (such as v_proj beside o_proj), or use projection='fastfood'."
        )
    named = (
        bool(names) or config.target_modules is None or config.target_modules in KEYWORDS or config.manifest is not None
    )
    if not users or not (named or any(is_targeted(config, key) for key, _, _ in adaptable)):  # the head alone
        raise ValueError(
            f"target_modules={config.target_modules!r} and target_parameters={config.target_parameters!r} matched "
            "no module with parameters of its own. Name linear layers, norms or embeddings, or pass 'all'."
        )
    adapted = {module for held in users.values() for module, _ in held}
    for key, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper) and module.original_module in adapted:
            raise ValueError(
                f"trainable_token_indices={config.trainable_token_indices!r}: P adapts {key} too, so its offset would "
                f"be lost. Exclude it: exclude_modules=['{key}']."
            )
    groups = lambda_groups(users, config.lambda_granularity) if config.said else {}
    heads = {name: is_head(config, name.rpartition(".")[0]) for name in users}
    shapes = {name: matrix_view(*each[0], head=heads[name]) for name, each in users.items()}
    targeting = Targeting(users, shapes, groups, _specify(config, len(set(groups.values())), shapes, values))
    if config.manifest is not None:
        check_manifest(config.manifest, shapes)
    return targeting


def token_rows(model: nn.Module, config: Any) -> dict[str, Sequence[int]]:
    """The trained rows of each embedding, by the embedding's name in the base model.

    Raises:
        ValueError, TypeError: `trainable_token_indices` names no embedding, or rows that it does not have.
    """
    option = config.trainable_token_indices
    if not option:
        return {}
    if isinstance(option, Mapping):
        given = dict(option)
    else:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        embedding = getattr(embedding, "original_module", embedding)
        inputs = [key for key, module in base_modules(model) if module is embedding]
        if not inputs:
            raise ValueError(
                f"trainable_token_indices={option!r}: the input embedding of the model is unknown. Pass "
                "a dictionary: {'name of the embedding': indices}."
            )
        given = {inputs[0]: option}
    result: dict[str, Sequence[int]] = {}
    for name, rows in given.items():
        found = {key: module for key, module in base_modules(model) if is_named([name], key)}
        sizes = {getattr(module, "num_embeddings", getattr(module, "out_features", 0)) for module in found.values()}
        if not found or 0 in sizes:
            raise ValueError(f"trainable_token_indices={option!r}: the model has no embedding {name!r}. Name one.")
        if isinstance(rows, str) or not all(type(row) is int for row in rows):
            raise TypeError(f"trainable_token_indices={option!r} must hold a list of ints for {name!r}.")
        if not rows or len(set(rows)) < len(rows) or not all(0 <= row < min(sizes) for row in rows):
            raise ValueError(
                f"trainable_token_indices={option!r}: the rows of {name!r} must be different indices from 0 to "
                f"{min(sizes) - 1}, at least one."
            )
        result |= dict.fromkeys(found, rows)
    return result


def lambda_groups(names: Iterable[str], granularity: str) -> dict[str, int]:
    """Index of the λ of each parameter. `names` come in the order of the model."""
    labels = {}
    blocks_seen = False
    for name in names:
        block = block_of(name)
        blocks_seen |= block is not None
        layer = block or ("after" if blocks_seen else "before")
        labels[name] = {"tensor": name, "module": name.rpartition(".")[0], "layer": layer}[granularity]
    index = {label: i for i, label in enumerate(dict.fromkeys(labels.values()))}
    return {name: index[label] for name, label in labels.items()}


def _specify(config: Any, count: int, shapes: Shapes, values: Mapping[str, ValueBias]) -> Spec:
    """The projection, checked before anything is allocated: a configuration is untrusted input."""
    total = sum(shape.size for shape in shapes.values())
    if config.d <= count:
        raise ValueError(
            f"d={config.d} must exceed the number of λ, which is {count} with lambda_granularity="
            f"{config.lambda_granularity!r}. Use a larger d, a coarser granularity, or said=False."
        )
    if values:
        sizes = {name: values[name].size if name in values else shape.size for name, shape in shapes.items()}
        if config.d > (size := sum(sizes.values())):
            head = "" if sizes.keys() <= values.keys() else " and weights of the head"
            raise ValueError(
                f"d={config.d} exceeds the {size} values of the attention layers{head}. Use d ≤ {size} or "
                "projection='fastfood'."
            )
        if config.block_size is not None and config.manifest is None and sizes.keys() <= values.keys():
            raise ValueError(
                f"block_size={config.block_size} has no effect on projection={config.projection!r}, whose biases have "
                "no blocks. Leave it out, or use projection='fastfood'."
            )
    option = "target_modules" if config.target_modules is not None else "target_parameters"
    if config.d > total:
        raise ValueError(
            f"d={config.d} exceeds the {total} weights selected by {option}={getattr(config, option)!r}. "
            f"Use d ≤ {total} or select more modules."
        )
    n = config.block_size or BLOCK_SIZE
    height = min(max(shape.rows for shape in shapes.values()), 16384)
    numbers = n * (height + sum(-(-shape.cols // n) for shape in shapes.values()))
    if config.projection in ("fastfood", "global", *OF_VALUES) and numbers > max(MAX_RANDOM_NUMBERS, 16 * total):
        raise ValueError(
            f"block_size={n} needs {numbers:.2g} random numbers for {total} adapted weights. "
            "Use a smaller block_size, or None."
        )
    factor = LAMBDA_SCALE[config.scale] if config.said else 1
    return Spec(config.d - count, config.seed, n, config.scale, factor, config.subspace, values)


def identify(module: nn.Module, own: str) -> Any:
    """Identify a parameter: the result is equal for all modules that have it."""
    # Some quantized layers have none for `weight`, an added bias has none, and scripted modules hold no dictionary.
    parameter = dict(module._parameters).get(own)
    return (id(module), own) if parameter is None else id(parameter)


def _join(key: str, own: str) -> str:
    return f"{key}.{own}" if key else own
