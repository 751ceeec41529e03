"""The commands pack and unpack."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..bounds.texts import train_rounded
from ..codec import adapter_to_string, compress, load_packed, qr_code, read_packed
from ..codec.text import check_ending
from ..trials.store import write_whole
from . import inputs


def pack(args: argparse.Namespace) -> None:
    """Pack an adapter, and report its accuracy before and after if there are held-out data."""
    if args.finetune and not (args.train and args.levels):
        raise ValueError(f"--finetune {args.finetune} needs --train and --levels.")
    if args.train and not (args.finetune or args.eval):
        raise ValueError(f"--train {args.train} is for --finetune, or names the classes of --eval. Add one of them.")
    config = inputs.read_adapter_config(args.adapter)
    kind = getattr(config.task_type, "value", config.task_type)
    if (args.eval or args.train) and kind not in (None, "SEQ_CLS"):
        raise ValueError(f"--eval and --train are for adapters that classify texts, not for {kind}. Leave them out.")
    out = inputs.prepare_output_file("--out", args.out)
    if args.qr:
        check_ending(inputs.prepare_output_file("--qr", args.qr))
    named, labels = config.base_model_name_or_path, inputs.choose_labels(args, config.num_labels)
    trained = inputs.read_scores(args.adapter)
    texts = inputs.load_texts(args, named, labels, **trained) if args.eval or args.train else None
    base = texts.base if texts else inputs.load_base(inputs.find_base_name(args, named), config.task_type, labels)
    model = inputs.load_adapter(args, base, args.adapter, config.num_labels, is_trainable=bool(args.finetune))
    before = texts.accuracy(model) if texts and args.eval else None
    if texts and args.finetune:
        train_rounded(texts, model, args.levels, args.finetune, args.lr, 0)
    data = compress(model, args.levels, max_bytes=args.max_bytes, max_error=args.max_error)
    write_whole(out, data)
    packed = read_packed(data)
    print(
        f"{args.out}: {len(data)} bytes, d = {packed.d}, θ rounded to {len(packed.values)} values, for "
        f"{packed.base or 'a base model'}"
    )
    if texts and before is not None:
        model.unload()
        print(f"accuracy {before:.4f} before, {texts.accuracy(load_packed(base, data)):.4f} packed")
    if args.text_form:
        print(adapter_to_string(data))
    if args.qr:
        qr_code(data, args.qr)


def unpack(args: argparse.Namespace) -> None:
    """Unpack an adapter into a folder. This needs its base model."""
    packed = read_packed(args.file)
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise ValueError(f"--out {args.out} holds files already. Name a new folder.")
    base = inputs.load_base(
        inputs.find_base_name(args, packed.base), packed.options["task_type"], inputs.get_labels(args.file, packed)
    )
    load_packed(base, args.file).save_pretrained(args.out)
    print(f"{args.out}: d = {packed.d}, for {packed.base or args.model}")
