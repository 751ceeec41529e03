"""The command info."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..bounds.certify import get_certificate_path, parse_certificate
from ..codec import read_packed
from ..supermask import SupermaskConfig
from ..tuner import IntrinsicConfig
from . import inputs

TARGETS = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
    *("add_bias", "head", "modules_to_save", "trainable_token_indices"),
)
"""Options that define what is adapted or trained."""


def info(args: argparse.Namespace) -> None:
    """Print what an adapter is, and whether it fits a base model. The status is 1 if it does not."""
    path = Path(inputs.resolve_path(args.adapter))
    if path.is_file():
        options = _read_packed_options(path)
    else:
        options = inputs.read_adapter_config(str(path), (IntrinsicConfig, SupermaskConfig)).to_dict()
    stored = options.get("num_labels")
    options["num_labels"] = inputs.choose_labels(args, stored)
    rows = {**_describe(path, options), "certificate": _describe_certificates(path)}
    fits, rows["fits"] = _compare(args, path, options, stored)
    for name, value in rows.items():
        print(f"{name:<14}{value}")
    if fits is False:
        raise SystemExit(1)


def _read_packed_options(path: Path) -> dict[str, Any]:
    """Read the options of a packed adapter, by their names in `IntrinsicConfig`."""
    packed = read_packed(path)
    return {
        **packed.options,
        **{name: getattr(packed, name) for name in ("d", "seed", "block_size")},
        "algorithm_version": packed.algorithm,
        "num_labels": inputs.get_labels(path, packed),
        "base_model_name_or_path": packed.base,
        "base_digest": packed.base_digest.hex(),
        "manifest": packed.manifest_digest.hex(),
    }


def _describe(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Describe an adapter, by the names of the printed rows."""
    packed = path.is_file()
    size = path.stat().st_size if packed else inputs.count_adapter_bytes(path)
    rows: dict[str, Any] = {"adapter": f"{path}, {size} bytes" + (", packed" if packed else "")}
    if "final_sparsity" in options:
        zeros = options["final_sparsity"]
        rows["method"] = f"supermask, mask={options['mask']!r}"
        rows["density"] = "not stored" if zeros is None else f"{1 - zeros:.2%} of the masked weights"
        rows["seed"] = options["seed"]
    else:
        names = ("block_size", "scale", "algorithm_version")
        rows["method"] = f"SAID, one λ per {options['lambda_granularity']}" if options["said"] else "DID"
        rows |= {name: options[name] for name in ("d", "seed")}
        rows["projection"] = ", ".join([options["projection"], *(f"{name}={options[name]}" for name in names)])
    targets = {name: value for name in TARGETS if (value := options.get(name))}
    rows["targets"] = ", ".join(
        f"{name}={sorted(value) if isinstance(value, set) else value!r}" for name, value in targets.items()
    )
    stored = {
        "task": options["task_type"],
        "labels": options["num_labels"],
        "base model": options["base_model_name_or_path"],
        "base digest": options.get("base_digest"),
        "manifest": (options.get("manifest") or "").partition(":")[0],
    }
    return {**rows, **{name: value or "not stored" for name, value in stored.items()}}


def _describe_certificates(path: Path) -> str:
    """Describe the certificate beside a packed adapter, or those in the folder of an adapter."""
    files = [get_certificate_path(path)] if path.is_file() else sorted(path.glob("*.certificate.json"))
    claims = []
    for file in filter(Path.exists, files):
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            claim, adapter = parse_certificate(stored["certificate"]).claim(), stored["adapter"]
            digest = adapter["sha256"] if path.is_file() else adapter.get("weights_sha256")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is not a certificate ({error!r}). Write it with certify.") from None
        weights = path if path.is_file() else path / SAFETENSORS_WEIGHTS_NAME
        if digest and weights.is_file() and digest != hashlib.sha256(weights.read_bytes()).hexdigest():
            claim += ", but of another adapter"
        claims.append(f"{claim} ({file.name})")
    return "; ".join(claims) or "none"


def _compare(
    args: argparse.Namespace, path: Path, options: Mapping[str, Any], stored: int | None
) -> tuple[bool | None, str]:
    """Load an adapter into a base model: that of `--model`, or else the one that it names, if it is on this machine.

    Returns:
        Whether the adapter fits, `None` if it was not compared; and what to print.
    """
    task, labels = options["task_type"], options["num_labels"]
    name = args.model or options["base_model_name_or_path"]
    if not name:
        return None, "not compared: the adapter does not name its base model. Pass --model."
    try:
        model = inputs.load_base(name, task, labels, local_files_only=args.model is None)
    except OSError:
        if args.model:
            raise
        return None, f"not compared: {name} is not on this machine. Pass --model."
    except (ValueError, RuntimeError) as error:
        loaded_as = inputs.MODEL_CLASSES.get(task or "", "AutoModel") + (f" with {labels} labels" if labels else "")
        return False, f"no: {name} cannot be loaded as {loaded_as}. {' '.join(str(error).split())}"
    try:
        inputs.load_adapter(args, model, str(path), stored)
    except ValueError as error:
        return False, f"no: {error}"
    shapes = ", shapes and weights" if options.get("base_digest") else " and shapes"
    return True, f"yes: names{shapes} agree with {name}"
