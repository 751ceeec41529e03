"""Makes and verifies certificates of packed adapters, from the file and the training data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..codec import load_packed, read_packed
from ..codec.adapter import check_trained
from ..text.documents import Documents
from ..text.labeled import LabeledTexts
from ..trials.store import write_whole
from ..version import __version__
from .certificate import Certificate
from .formulas import check
from .language import LanguageCertificate
from .texts import pack_rounded

AnyCertificate = Certificate | LanguageCertificate
AnyTexts = LabeledTexts | Documents

SLACK = 0.001
"""Tolerance for a bound from another machine, where another order of summation changes a few predictions or bits."""

DIGESTS = ("adapter", "training_data")
"""Parts of a certificate's file that have a SHA-256."""

COUNTS = ("m", "n", "bits", "majority", "vocabulary")
"""Inputs of certificates that are the same on every machine."""

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


def measure_packed(data: bytes, texts: AnyTexts, splits: Sequence[str]) -> dict[str, Any]:
    """Measure a packed adapter, as it is deployed, on splits, `train` and `eval`. See `measure` of the texts.

    Raises:
        ValueError: the adapter belongs to another base model, or is damaged.
    """
    model = load_packed(texts.base, data)
    try:
        return texts.measure(model, splits)
    finally:
        model.unload()


def build_certificate(
    texts: AnyTexts, measured: Mapping[str, Any], bits: float, num_tried: int, delta: float
) -> AnyCertificate:
    """Build the certificate of an adapter from what `measure_packed` returned. See `Certificate` for the others.

    For documents, the weight of the uniform distribution is the one with the lowest bound, for the adapter and for the
    base model.
    """
    if isinstance(texts, LabeledTexts):
        test = {name: measured.get(name) for name in ("test_errors", "test_n")}
        n, majority = len(texts.data["train"]), texts.count_majority_errors()
        return Certificate(n, measured["errors"], bits, num_tried, delta, majority, **test)
    alphas = texts.alphas

    def build(i: int, j: int) -> LanguageCertificate:
        return LanguageCertificate(
            m=len(texts.data["train"]),
            n=texts.sample,
            risk=measured["risks"][i],
            alpha=alphas[i],
            vocabulary=texts.vocabulary,
            bits=bits,
            untrained_risk=texts.untrained[j],
            untrained_alpha=alphas[j],
            alphas=alphas,
            num_tried=num_tried,
            delta=delta,
            test_risk=measured["test_risks"][i] if "test_risks" in measured else None,
            test_n=measured.get("test_n"),
        )

    untrained = min(range(len(alphas)), key=lambda j: build(0, j).untrained_bound)
    return min((build(i, untrained) for i in range(len(alphas))), key=lambda one: one.bound)


def make_certificate(data: bytes, texts: AnyTexts, num_tried: int, delta: float, eval: bool) -> AnyCertificate:
    """Make the certificate of a packed adapter, which is measured as it is deployed.

    Args:
        data: bytes of the packed adapter.
        texts: its training data and base model: `LabeledTexts`, or `Documents` for a language model.
        num_tried: combinations of d, seed, learning rate, steps and levels that it was chosen from.
        delta: probability that the bound fails.
        eval: whether the evaluation split is test data, on which it is measured too.

    Raises:
        ValueError: the adapter belongs to another base model, or is damaged.
    """
    measured = measure_packed(data, texts, ["train", "eval"] if eval else ["train"])
    return build_certificate(texts, measured, count_message_bits(data), num_tried, delta)


def pack_adapter(
    texts: AnyTexts, folder: str, levels: Sequence[int], steps: int = 0, learning_rate: float = 2e-4
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


def _describe(data: bytes, certificate: AnyCertificate, texts: AnyTexts) -> dict[str, Any]:
    """The content of a certificate's file."""
    return {
        "certificate": certificate.to_dict(),
        "adapter": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "training_data": {"rows": len(texts.data["train"]), "sha256": compute_digest(texts.task.data["train"])},
        "max_length": texts.training.options.max_length,
        "peft_intrinsic": __version__,
    }


def write_certified(
    path: Path, data: bytes, certificate: AnyCertificate, texts: AnyTexts, folder: Path | None = None
) -> Path:
    """Write a packed adapter and, next to it, its certificate as JSON, whose path is returned.

    `folder` is that of the adapter before it was packed, if there is one.
    """
    target, content = get_certificate_path(path), _describe(data, certificate, texts)
    if folder and (weights := folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        content["adapter"]["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    write_whole(path, data)
    write_whole(target, json.dumps(content, indent=1) + "\n")
    return target


def parse_certificate(values: Mapping[str, Any]) -> AnyCertificate:
    """Make the certificate of a classifier or of a language model from the inputs in a dictionary.

    Raises:
        ValueError: an input is missing, unknown or out of range.
    """
    return (LanguageCertificate if "vocabulary" in values else Certificate).from_dict(values)


def read_certificate(path: Path) -> tuple[AnyCertificate, dict[str, Any]]:
    """Read the certificate beside a packed adapter's file, and the content of its own file.

    Raises:
        ValueError: the file of the certificate is missing or damaged.
    """
    target = get_certificate_path(path)
    if not target.exists():
        raise ValueError(f"there is no {target.name} beside {path.name}. Write it with certify.")
    try:
        content = json.loads(target.read_text(encoding="utf-8"))
        stored = parse_certificate(content["certificate"])
        float(content["certificate"]["bound"])
        for name in DIGESTS:
            content[name]["sha256"]
        if isinstance(stored, LanguageCertificate):
            check(max_length=content["max_length"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{target} is no certificate ({error!r}). Make it with certify.") from None
    return stored, content


def check_num_tried(
    paths: Iterable[Path], candidates: Iterable[bytes], texts: AnyTexts, num_tried: int, count: int
) -> None:
    """Check that no certificate counts more adapters as tried than the new one, from the same bytes and data.

    Args:
        paths: files of packed adapters, beside which certificates may lie. Damaged certificates are ignored.
        candidates: bytes of the packed adapters to certify.
        texts: their training data and base model.
        num_tried: combinations that were tried elsewhere (`--num-tried`).
        count: adapters that this call chooses from, which multiply `num_tried`.

    Raises:
        ValueError: a certificate of one of them counts more.
    """
    adapters = [hashlib.sha256(data).hexdigest() for data in candidates]
    training_data = compute_digest(texts.task.data["train"])
    for path in paths:
        try:
            stored, content = read_certificate(path)
        except ValueError:
            continue
        same = content["adapter"]["sha256"] in adapters and content["training_data"]["sha256"] == training_data
        if same and stored.num_tried > num_tried * count:
            raise ValueError(
                f"--num-tried {num_tried}: {get_certificate_path(path).name} counts {stored.num_tried} adapters. "
                f"Pass --num-tried {-(-stored.num_tried // count)}."
            )


def verify_certificate(path: Path, texts: AnyTexts) -> tuple[AnyCertificate, AnyCertificate, list[str]]:
    """Compute the certificate of a packed adapter's file again, and compare it with the stored one.

    Returns:
        The stored certificate, the new one, and the differences that make the stored one wrong.

    Raises:
        ValueError: the file of the certificate is missing or damaged.
    """
    stored, content = read_certificate(path)
    bound, data = float(content["certificate"]["bound"]), path.read_bytes()
    new = make_certificate(data, texts, stored.num_tried, stored.delta, eval=False)
    computed = _describe(data, new, texts)
    pairs = [(f"SHA-256 of {name}", *(one[name]["sha256"] for one in (content, computed))) for name in DIGESTS]
    pairs += [(name, getattr(stored, name), getattr(new, name)) for name in COUNTS if hasattr(stored, name)]
    differences = [f"{name}: {claim} stored, {value} computed" for name, claim, value in pairs if claim != value]
    for name, value in json.loads(json.dumps(stored.to_dict())).items():
        if name != "bound" and _differs(claim := content["certificate"].get(name, value), value):
            differences.append(f"{name}: {claim} stored, {value} from the stored inputs")
    if not bound >= max(stored.bound - ROUNDING, new.bound - SLACK):  # also true for NaN
        difference = f"bound: {bound} stored, {stored.bound} from the stored inputs, {new.bound} computed"
        if isinstance(stored, LanguageCertificate) and stored.n < stored.m:
            reason = "earlier versions did not count the choices made with the sampled documents (n < m)"
            difference += f" ({reason}: run certify again)"
        differences.append(difference)
    if stored.risk < new.risk - SLACK:
        differences.append(f"training loss: {stored.risk:g} stored, {new.risk:g} computed")
    if isinstance(stored, LanguageCertificate) and isinstance(new, LanguageCertificate):
        claim, value = stored.untrained_bound, new.untrained_bound
        if not abs(claim - value) <= SLACK:
            differences.append(f"untrained_bound: {claim} stored, {value} computed")
    return stored, new, differences


def _differs(claim: Any, value: Any) -> bool:
    """Whether a stored claim differs from the computed value; in a dictionary, whether any claim does."""
    if isinstance(value, dict):
        return not isinstance(claim, dict) or any(_differs(claim[name], value.get(name)) for name in claim)
    if isinstance(value, float):
        return not isinstance(claim, int | float) or not abs(claim - value) <= ROUNDING
    return claim != value
