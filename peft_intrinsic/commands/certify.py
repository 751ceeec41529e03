"""The commands certify and verify."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..bounds.certificate import Certificate
from ..bounds.certify import make_certificate, pack_adapter, verify_certificate, write_certified
from ..bounds.sweep import plot_sweep, sweep
from ..codec import read_packed
from ..codec.adapter import DEFAULT_LEVELS
from ..trials.store import write_whole
from .inputs import output_file, read_adapter_config
from .pack import packed_texts, stored_labels


def certify(args: argparse.Namespace) -> None:
    """Certificates of one adapter, or of a sweep."""
    Certificate(
        n=1, errors=0, bits=1, num_tried=args.num_tried, delta=args.delta
    )  # refuses them before hours are spent
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
        out = output_file("--out", args.out or source)
        adapter = read_packed(source)
        texts = packed_texts(args, adapter.base, args.train, args.eval, stored_labels(source, adapter))
        candidates = [source.read_bytes()]
    else:
        config = read_adapter_config(args.adapter)
        out = output_file("--out", args.out or source / "adapter.pia")
        texts = packed_texts(args, config.base_model_name_or_path, args.train, args.eval, config.num_labels)
        candidates = pack_adapter(texts, args.adapter, args.levels, args.finetune, args.lr)
    num_tried = args.num_tried * len(candidates)
    made = [(make_certificate(data, texts, num_tried, args.delta, bool(args.eval)), data) for data in candidates]
    found, data = min(made, key=lambda pair: pair[0].bound)
    beside = write_certified(out, data, found, texts)
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
    texts = packed_texts(args, None, args.train, args.eval)
    chosen = (args.steps, args.finetune, args.lr, args.seed, args.delta, bool(args.eval), args.num_tried)
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
    texts = packed_texts(args, adapter.base, args.train, None, stored_labels(path, adapter))
    claimed, found, unlike = verify_certificate(path, texts)
    print(found.report())
    if claimed.test_n is not None:
        unseen = f"test_errors={claimed.test_errors} of test_n={claimed.test_n}"
        print(f"{unseen} were not counted again: verify has no data for evaluation.")
    if unlike:
        raise ValueError(f"{path} does not bear out the certificate beside it. " + "; ".join(unlike) + ".")
    print("Agrees with the certificate beside it.")
