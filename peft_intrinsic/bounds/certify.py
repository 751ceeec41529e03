"""Makes and verifies certificates of packed adapters, from the file and the training data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel

from ..codec import load_packed, read_packed
from ..codec.adapter import check_trained
from ..text.labeled import LabeledTexts
from ..trials.store import write_whole
from ..version import __version__
from .certificate import Certificate
from .texts import pack_rounded

SLACK = 0.001
"""Tolerance for a bound from another machine, where another order of summation changes a few predictions."""

ROUNDING = 1e-9
"""Tolerance for results computed from the same inputs."""


def get_certificate_path(path: Path) -> Path:
    """Get the path of the certificate of a packed adapter's file."""
    return path.with_name(path.name.removesuffix(".pia") + ".certificate.json")


def count_message_bits(data: bytes) -> int:
    """Count the learned bits of a packed adapter: those of its body.

    The head holds what is fixed beforehand: base model, d, seed and options of the projection. Choices among them that
    used the training data count as combinations tried.

    Raises:
        ValueError: the bytes are no packed adapter.
    """
    return 8 * (len(data) - 4 - len(read_packed(data).encode_head()))


def count_errors(data: bytes, texts: LabeledTexts, splits: Sequence[Literal["train", "eval"]]) -> list[int]:
    """Count the wrong predictions of a packed adapter on each split.

    Raises:
        ValueError: the adapter belongs to another base model, or is damaged.
    """
    model = load_packed(texts.base, data)
    try:
        return [texts.count_errors(model, split) for split in splits]
    finally:
        model.unload()


def make_certificate(data: bytes, texts: LabeledTexts, num_tried: int, delta: float, eval: bool) -> Certificate:
    """Make the certificate of a packed adapter, whose errors are counted as it is deployed.

    Args:
        data: bytes of the packed adapter.
        texts: its training data and base model.
        num_tried: combinations of d, seed, learning rate, steps and levels that it was chosen from.
        delta: probability that the bound fails.
        eval: whether the evaluation split is test data, on which errors are counted too.

    Raises:
        ValueError: the adapter belongs to another base model, or is damaged.
    """
    errors = count_errors(data, texts, ["train", "eval"] if eval else ["train"])
    test = (errors[1], len(texts.data["eval"])) if eval else (None, None)
    n, bits = len(texts.data["train"]), count_message_bits(data)
    return Certificate(n, errors[0], bits, num_tried, delta, texts.count_majority_errors(), *test)


def pack_adapter(
    texts: LabeledTexts, folder: str, levels: Sequence[int], steps: int = 0, learning_rate: float = 2e-4
) -> list[bytes]:
    """Pack the saved adapter in a folder with each number of levels.

    Args:
        texts: training data and base model of the adapter.
        folder: folder of the adapter.
        levels: numbers of values that θ is rounded to.
        steps, learning_rate: quantization-aware training, see `pack_rounded`.

    Raises:
        ValueError: the adapter trains modules outside the d parameters, which the message does not hold.
    """
    model: Any = PeftModel.from_pretrained(texts.base, folder, is_trainable=True)
    try:
        check_trained(model.peft_config["default"])  # before training
        return [pack_rounded(texts, model, count, steps, learning_rate, 0) for count in levels]
    finally:
        model.unload()


def compute_digest(rows: Any) -> str:
    """Compute the SHA-256 of labeled texts from their rows as JSON lines, wherever their files are."""
    lines = (json.dumps(row, sort_keys=True, ensure_ascii=True).encode() + b"\n" for row in rows)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def _describe(data: bytes, certificate: Certificate, texts: LabeledTexts) -> dict[str, Any]:
    """The content of a certificate's file."""
    return {
        "certificate": certificate.to_dict(),
        "adapter": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "training_data": {"rows": certificate.n, "sha256": compute_digest(texts.task.data["train"])},
        "max_length": texts.training.options.max_length,
        "peft_intrinsic": __version__,
    }


def write_certified(path: Path, data: bytes, certificate: Certificate, texts: LabeledTexts) -> Path:
    """Write a packed adapter and, next to it, its certificate as JSON, whose path is returned."""
    target = get_certificate_path(path)
    write_whole(path, data)
    write_whole(target, json.dumps(_describe(data, certificate, texts), indent=1) + "\n")
    return target


def verify_certificate(path: Path, texts: LabeledTexts) -> tuple[Certificate, Certificate, list[str]]:
    """Compute the certificate of a packed adapter's file again, and compare it with the stored one.

    Returns:
        The stored certificate, the new one, and the differences that make the stored one wrong.

    Raises:
        ValueError: the file of the certificate is missing or damaged.
    """
    target = get_certificate_path(path)
    if not target.exists():
        raise ValueError(f"there is no {target.name} beside {path.name}. Write it with certify.")
    try:
        content = json.loads(target.read_text(encoding="utf-8"))
        stored = Certificate.from_dict(content["certificate"])
        bound = float(content["certificate"]["bound"])
        digests = {name: content[name]["sha256"] for name in ("adapter", "training_data")}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{target} is no certificate ({error!r}). Make it with certify.") from None
    data = path.read_bytes()
    new = make_certificate(data, texts, stored.num_tried, stored.delta, eval=False)
    computed = _describe(data, new, texts)
    pairs = [(f"SHA-256 of {name}", digest, computed[name]["sha256"]) for name, digest in digests.items()]
    pairs += [(name, getattr(stored, name), getattr(new, name)) for name in ("n", "bits", "majority")]
    differences = [f"{name}: {claim} stored, {value} computed" for name, claim, value in pairs if claim != value]
    for name, value in stored.to_dict().items():
        if name != "bound" and _differs(claim := content["certificate"].get(name, value), value):
            differences.append(f"{name}: {claim} stored, {value} from the stored inputs")
    if not bound >= max(stored.bound - ROUNDING, new.bound - SLACK):  # also true for NaN
        differences.append(
            f"bound: {bound} stored, {stored.bound} from the stored inputs, {new.bound} computed ({stored.errors} and "
            f"{new.errors} errors)"
        )
    return stored, new, differences


def _differs(claim: Any, value: Any) -> bool:
    """Whether a stored claim differs from the computed value; in a dictionary, whether any claim does."""
    if isinstance(value, dict):
        return not isinstance(claim, dict) or any(_differs(claim[name], value.get(name)) for name in claim)
    if isinstance(value, float):
        return not isinstance(claim, int | float) or not abs(claim - value) <= ROUNDING
    return claim != value
