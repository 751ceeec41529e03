"""What the commands pack, unpack, certify and verify do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoConfig

from ..bases import load_base
from ..codec import Packed, adapter_to_string, compress, load_packed, qr_code, quantisation_aware, read_packed
from ..codec.adapter import DEFAULT_LEVELS
from ..codec.text import check_ending
from ..measure.store import write_whole
from ..tuner import IntrinsicConfig
from ..tuner.labels import LABELS
from .certificate import Certificate
from .certify import certificate, differences, packed, write
from .plot import plot_sweep
from .sweep import sweep
from .texts import TUNING, PackedTexts


def _config(folder: str) -> IntrinsicConfig:
    """The configuration of an adapter.

    Raises:
        ValueError: it is of another method, or there is none.
    """
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is no adapter's folder, or cannot be read: {error}") from None
    if not isinstance(config, IntrinsicConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{folder} holds an adapter of type {kind}. Name one of IntrinsicConfig.")
    return config


def _file(option: str, place: str | Path) -> Path:
    """Where a file will be written: its folder is made.

    Raises:
        ValueError: a folder is there.
    """
    path = Path(place)
    if path.is_dir():
        raise ValueError(f"{option} {place} is a folder. Name a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _name(args: argparse.Namespace, own: str | None) -> str:
    """The name of the base model: the user's, or else the adapter's.

    Raises:
        ValueError: neither says, or what the adapter says cannot be found.
    """
    if args.model:
        return args.model
    if not own:
        raise ValueError("The adapter does not name its base model. Name it: --model.")
    try:
        AutoConfig.from_pretrained(own)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The adapter names {own!r} as its base model, which is neither a model's folder here nor on the Hub. Name "
            f"it: --model. (A packed adapter holds only the last part of a folder's path. {error})"
        ) from error
    return own


def _labels(file: str | Path, packed: Packed) -> int | None:
    """The number of labels that a packed adapter stores; None where it stores none.

    Raises:
        ValueError: there are too many.
    """
    if packed.classes > LABELS:
        raise ValueError(f"{file} asks for {packed.classes} labels; more than {LABELS} are not unpacked.")
    return packed.classes or None


def _texts(
    args: argparse.Namespace, own: str | None, train: str, eval: str | None, labels: int | None = None
) -> PackedTexts:
    return PackedTexts(_name(args, own), train, eval, args.text, args.label, args.batch, labels)


def pack(args: argparse.Namespace) -> None:
    """An adapter's folder as a packed file; its accuracy before and after, where there are data."""
    if args.finetune and not (args.train and args.levels):
        raise ValueError(f"--finetune {args.finetune} needs --train and --levels.")
    if args.train and not (args.finetune or args.eval):
        raise ValueError(f"--train {args.train} is for --finetune, or names the classes of --eval. Add one of them.")
    config = _config(args.adapter)
    out = _file("--out", args.out)
    if args.qr:
        check_ending(_file("--qr", args.qr))
    texts, own, labels = None, config.base_model_name_or_path, args.labels or config.num_labels
    if args.eval or args.train:
        texts = _texts(args, own, args.train or args.eval, args.eval, labels)
    base = texts.base if texts else load_base(_name(args, own), config.task_type, labels)
    try:
        model: Any = PeftModel.from_pretrained(base, args.adapter, is_trainable=bool(args.finetune))
    except ValueError as error:
        raise ValueError(f"{error} For another number of labels: --labels.") from None
    before = _accuracy(texts, model, args.eval)
    if texts and args.finetune:
        with quantisation_aware(model, args.levels):
            texts.train(model, args.finetune, TUNING * args.lr, 0)
    data = compress(model, args.levels, max_bytes=args.max_bytes, max_error=args.max_error)
    write_whole(out, data)
    found = read_packed(data)
    print(f"{args.out}: {len(data)} bytes, d = {found.d}, {len(found.values)} values of {found.base or 'a base model'}")
    if before is not None:
        model.unload()
        after = _accuracy(texts, load_packed(base, data), args.eval)
        print(f"accuracy {before:.4f} before, {after:.4f} packed")
    if args.text_form:
        print(adapter_to_string(data))
    if args.qr:
        qr_code(data, args.qr)


def _accuracy(texts: PackedTexts | None, model: Any, held_out: str | None) -> float | None:
    return None if texts is None or held_out is None else texts.accuracy(model)


def unpack(args: argparse.Namespace) -> None:
    """A packed adapter as a folder, through its base model."""
    found = read_packed(args.file)
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise ValueError(f"--out {args.out} holds files already. Name a new folder.")
    base = load_base(_name(args, found.base), found.options["task_type"], _labels(args.file, found))
    model = load_packed(base, args.file)
    model.save_pretrained(args.out)
    print(f"{args.out}: d = {found.d}, for {found.base or args.model}")


def certify(args: argparse.Namespace) -> None:
    """Certificates of one adapter, or of a sweep."""
    Certificate(n=1, errors=0, bits=1, tried=args.tried, delta=args.delta)  # refuses them before hours are spent
    if (args.adapter is None) == (args.dims is None):
        raise ValueError("name either --adapter, to certify it, or --dims, to train adapters and certify the best.")
    if args.dims:
        return _sweep(args)
    source = Path(args.adapter)
    if source.is_file():
        if args.levels != [DEFAULT_LEVELS] or args.finetune:
            given = f"--finetune {args.finetune}" if args.finetune else f"--levels {','.join(map(str, args.levels))}"
            raise ValueError(
                f"{given}: {source} is packed already. Name the adapter's folder, or leave the option out."
            )
        out = _file("--out", args.out or source)
        adapter = read_packed(source)
        texts = _texts(args, adapter.base, args.train, args.eval, _labels(source, adapter))
        candidates = [source.read_bytes()]
    else:
        config = _config(args.adapter)
        out = _file("--out", args.out or source / "adapter.pia")
        texts = _texts(args, config.base_model_name_or_path, args.train, args.eval, config.num_labels)
        candidates = packed(texts, args.adapter, args.levels, args.finetune, args.lr)
    tried = args.tried * len(candidates)
    made = [(certificate(data, texts, tried, args.delta, bool(args.eval)), data) for data in candidates]
    found, data = min(made, key=lambda pair: pair[0].bound)
    beside = write(out, data, found, texts)
    if source.is_dir() and (source / "README.md").is_file():
        _note(source / "README.md", found, out)
    print(found.report() + f"\n{out}: {len(data)} bytes; {beside}")


def _note(card: Path, found: Certificate, packed_file: Path) -> None:
    """One line in the model card, in place of an older one."""
    lines = [line for line in card.read_text(encoding="utf-8").splitlines() if not line.startswith("Certified: ")]
    lines.append(f"Certified: {found.claim()} ({packed_file.name}; `peft-intrinsic verify` computes it again).")
    write_whole(card, "\n".join(lines) + "\n")


def _sweep(args: argparse.Namespace) -> None:
    if not args.model or not args.out:
        raise ValueError("--dims needs --model, the base model, and --out, a folder.")
    texts = _texts(args, None, args.train, args.eval)
    chosen = (args.steps, args.finetune, args.lr, args.seed, args.delta, bool(args.eval), args.tried)
    rows = sweep(texts, args.dims, args.levels, args.out, *chosen)
    plot_sweep(rows, Path(args.out, "certificates.png"))
    print("| d | levels | bytes | bits with a table | with a prior | training error | test error | bound |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        found = Certificate.from_dict(row["certificate"])
        test = "" if found.test_errors is None or not found.test_n else f"{found.test_errors / found.test_n:.4f}"
        cells = [row[name] for name in ("d", "levels", "bytes", "table_bits", "prior_bits")]
        print(f"| {' | '.join(map(str, cells))} | {found.risk:.4f} | {test} | {found.bound:.4f} |")
    best = min((Certificate.from_dict(row["certificate"]) for row in rows), key=lambda found: found.bound)
    print("\n" + best.report() + f"\nbest.pia, its certificate, sweep.json and certificates.png in {args.out}")


def verify(args: argparse.Namespace) -> None:
    """Compute the certificate again.

    Raises:
        ValueError: it does not agree; the message says where.
    """
    path = Path(args.file)
    adapter = read_packed(path)
    texts = _texts(args, adapter.base, args.train, None, _labels(path, adapter))
    claimed, found, unlike = differences(path, texts)
    print(found.report())
    if claimed.test_n is not None:
        unseen = f"test_errors={claimed.test_errors} of test_n={claimed.test_n}"
        print(f"{unseen} were not counted again: verify has no data for evaluation.")
    if unlike:
        raise ValueError(f"{path} does not bear out the certificate beside it. " + "; ".join(unlike) + ".")
    print("Agrees with the certificate beside it.")
