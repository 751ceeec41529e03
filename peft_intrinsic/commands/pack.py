"""The commands pack and unpack."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft import PeftModel

from peft_intrinsic_autoload.labels import LABELS

from ..bounds.texts import train_rounded
from ..codec import PackedAdapter, adapter_to_string, compress, load_packed, qr_code, read_packed
from ..codec.text import check_ending
from ..text.labeled import LabeledTexts
from ..trials.store import write_whole
from .inputs import base_name, load_base, output_file, read_adapter_config


def stored_labels(file: str | Path, packed: PackedAdapter) -> int | None:
    """The number of labels that a packed adapter stores; None where it stores none.

    Raises:
        ValueError: there are too many.
    """
    if packed.classes > LABELS:
        raise ValueError(f"{file} asks for {packed.classes} labels; more than {LABELS} are not unpacked.")
    return packed.classes or None


def packed_texts(
    args: argparse.Namespace, own: str | None, train: str, eval: str | None, labels: int | None = None
) -> LabeledTexts:
    return LabeledTexts(base_name(args, own), train, eval, args.text, args.label, args.batch, labels)


def pack(args: argparse.Namespace) -> None:
    """An adapter's folder as a packed file; its accuracy before and after, where there are data."""
    if args.finetune and not (args.train and args.levels):
        raise ValueError(f"--finetune {args.finetune} needs --train and --levels.")
    if args.train and not (args.finetune or args.eval):
        raise ValueError(f"--train {args.train} is for --finetune, or names the classes of --eval. Add one of them.")
    config = read_adapter_config(args.adapter)
    out = output_file("--out", args.out)
    if args.qr:
        check_ending(output_file("--qr", args.qr))
    texts, own, labels = None, config.base_model_name_or_path, args.labels or config.num_labels
    if args.eval or args.train:
        texts = packed_texts(args, own, args.train or args.eval, args.eval, labels)
    base = texts.base if texts else load_base(base_name(args, own), config.task_type, labels)
    try:
        model: Any = PeftModel.from_pretrained(base, args.adapter, is_trainable=bool(args.finetune))
    except ValueError as error:
        raise ValueError(f"{error} For another number of labels: --labels.") from None
    before = _accuracy(texts, model, args.eval)
    if texts and args.finetune:
        train_rounded(texts, model, args.levels, args.finetune, args.lr, 0)
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


def _accuracy(texts: LabeledTexts | None, model: Any, held_out: str | None) -> float | None:
    return None if texts is None or held_out is None else texts.accuracy(model)


def unpack(args: argparse.Namespace) -> None:
    """A packed adapter as a folder, through its base model."""
    found = read_packed(args.file)
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise ValueError(f"--out {args.out} holds files already. Name a new folder.")
    base = load_base(base_name(args, found.base), found.options["task_type"], stored_labels(args.file, found))
    model = load_packed(base, args.file)
    model.save_pretrained(args.out)
    print(f"{args.out}: d = {found.d}, for {found.base or args.model}")
