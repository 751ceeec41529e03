"""Certificates of packed adapters: made from the file and the training data, and checked from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..codec import load_packed, read_packed
from ..trials.store import write_whole
from ..version import __version__
from .certificate import Certificate
from .texts import PackedTexts

SLACK = 0.001
"""What the bound of another machine may differ by: a sum in another order decides a few close examples otherwise."""

ROUNDING = 1e-9
"""What figures from the very same numbers may differ by."""


def beside(path: Path) -> Path:
    """Where the certificate of a packed adapter lies."""
    return path.with_name(path.name.removesuffix(".pia") + ".certificate.json")


def message_bits(data: bytes) -> int:
    """Bits of a packed adapter that were learnt: its body. Head and checksum follow from what is fixed beforehand.

    The head names the base model and the projection (d, seed, options): what was chosen there by looking at the
    training data is counted as combinations tried.

    Raises:
        ValueError: the bytes are no packed adapter.
    """
    return 8 * (len(data) - 4 - len(read_packed(data).head()))


def errors(data: bytes, texts: PackedTexts, splits: Sequence[str]) -> list[int]:
    """How many examples of each split, `train` or `eval`, a packed adapter gets wrong.

    Raises:
        ValueError: the adapter belongs to another base model, or is damaged.
    """
    model = load_packed(texts.base, data)
    try:
        return [texts.errors(model, split) for split in splits]
    finally:
        model.unload()


def certificate(data: bytes, texts: PackedTexts, num_tried: int, delta: float, eval: bool) -> Certificate:
    """Count the errors of the very adapter that is deployed, the packed one.

    Args:
        data: the packed adapter.
        texts: the data that it was trained on, and its base model.
        num_tried: combinations of d, seed, learning rate, steps and levels that it was chosen from.
        delta: the probability that the bound fails.
        eval: whether `texts` have data of their own for evaluation.

    Raises:
        ValueError: the adapter belongs to another base model, or is damaged.
    """
    wrong = errors(data, texts, ["train", "eval"] if eval else ["train"])
    unseen = (wrong[1], len(texts.data["eval"])) if eval else (None, None)
    n, bits = len(texts.data["train"]), message_bits(data)
    return Certificate(n, wrong[0], bits, num_tried, delta, texts.majority(), *unseen)


def packed(
    texts: PackedTexts, folder: str, levels: Sequence[int], steps: int = 0, learning_rate: float = 2e-4
) -> list[bytes]:
    """A saved adapter, packed with each number of levels.

    Args:
        texts: the data that it was trained on, and its base model.
        folder: of the adapter.
        levels, steps, learning_rate: of `PackedTexts.packed`.

    Raises:
        ValueError: the adapter trains a head outside the d numbers, which no bound of this kind covers.
    """
    model: Any = PeftModel.from_pretrained(texts.base, folder, is_trainable=True)
    try:
        if beside := model.peft_config["default"].trained_beside:
            raise ValueError(
                f"{beside} was trained in full: thousands of parameters that the message does not hold, so nothing "
                "can be certified. Train with the head inside the d parameters, without this option."
            )
        return [texts.packed(model, count, steps, learning_rate, 0) for count in levels]
    finally:
        model.unload()


def digest(rows: Any) -> str:
    """Of labelled texts, wherever they lie: SHA-256 of their rows as JSON lines."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True, ensure_ascii=True).encode() + b"\n")
    return found.hexdigest()


def write(path: Path, data: bytes, found: Certificate, texts: PackedTexts) -> Path:
    """The packed adapter, and beside it its certificate as JSON: what was counted, of which bytes and which data."""
    write_whole(path, data)
    place = beside(path)
    told = {
        "certificate": found.to_dict(),
        "adapter": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "training_data": {"rows": found.n, "sha256": digest(texts.task.data["train"])},
        "max_length": texts.max_length,
        "peft_intrinsic": __version__,
    }
    write_whole(place, json.dumps(told, indent=1) + "\n")
    return place


def differences(path: Path, texts: PackedTexts) -> tuple[Certificate, Certificate, list[str]]:
    """The certificate beside a packed adapter, the one computed again, and where the first is not borne out.

    Raises:
        ValueError: there is none beside it, or it is no such file.
    """
    place = beside(path)
    try:
        told = json.loads(place.read_text(encoding="utf-8"))
        claimed = Certificate.from_dict(told["certificate"])
        bound = float(told["certificate"]["bound"])
        sealed = {"adapter": told["adapter"]["sha256"], "training data": told["training_data"]["sha256"]}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place} is no certificate ({error!r}). Make it with certify.") from None
    data = path.read_bytes()
    found = certificate(data, texts, claimed.num_tried, claimed.delta, eval=False)
    here = {"adapter": hashlib.sha256(data).hexdigest(), "training data": digest(texts.task.data["train"])}
    unlike = [f"{name}: SHA-256 {sealed[name]} there, {here[name]} here" for name in here if sealed[name] != here[name]]
    for name in ("n", "bits", "majority"):
        if getattr(claimed, name) != getattr(found, name):
            unlike.append(f"{name}: {getattr(claimed, name)} there, {getattr(found, name)} here")
    for name, figure in claimed.to_dict().items():
        if name != "bound" and _unlike(written := told["certificate"].get(name, figure), figure):
            unlike.append(f"{name}: {written} there, {figure} from the numbers there")
    if not bound >= max(claimed.bound - ROUNDING, found.bound - SLACK):  # nor NaN
        unlike.append(
            f"bound: {bound} there; {claimed.bound} from the numbers there, {found.bound} here ({claimed.errors} and "
            f"{found.errors} errors)"
        )
    return claimed, found, unlike


def _unlike(written: Any, figure: Any) -> bool:
    """Whether what is written is not this figure; of several, whether any of those written is not."""
    if isinstance(figure, dict):
        return not isinstance(written, dict) or any(_unlike(written[name], figure.get(name)) for name in written)
    if isinstance(figure, float):
        return not isinstance(written, int | float) or not abs(written - figure) <= ROUNDING
    return written != figure
