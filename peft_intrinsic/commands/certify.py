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
from .inputs import get_labels, load_texts, prepare_output_file, read_adapter_config


def certify(args: argparse.Namespace) -> None:
    """Certify one adapter, or the best of a sweep."""
    Certificate(n=1, errors=0, bits=1, num_tried=args.num_tried, delta=args.delta)  # checks both before training
    if (args.adapter is None) == (args.dims is None):
        raise ValueError("name either --adapter, to certify it, or --dims, to train adapters and certify the best.")
    if args.dims:
        return _certify_sweep(args)
    source = Path(args.adapter)
    if source.is_file():
        if args.levels != [DEFAULT_LEVELS] or args.finetune:
            given = f"--finetune {args.finetune}" if args.finetune else f"--levels {','.join(map(str, args.levels))}"
            raise ValueError(
                f"{given}: {source} is packed already. Name the adapter's folder, or leave the option out."
            )
        out = prepare_output_file("--out", args.out or source)
        adapter = read_packed(source)
        texts = load_texts(args, adapter.base, get_labels(source, adapter))
        candidates = [source.read_bytes()]
    else:
        config = read_adapter_config(args.adapter)
        out = prepare_output_file("--out", args.out or source / "adapter.pia")
        texts = load_texts(args, config.base_model_name_or_path, config.num_labels)
        candidates = pack_adapter(texts, args.adapter, args.levels, args.finetune, args.lr)
    num_tried = args.num_tried * len(candidates)
    certified = [(make_certificate(data, texts, num_tried, args.delta, bool(args.eval)), data) for data in candidates]
    certificate, data = min(certified, key=lambda pair: pair[0].bound)
    certificate_path = write_certified(out, data, certificate, texts)
    if source.is_dir() and (source / "README.md").is_file():
        _write_claim(source / "README.md", certificate, out)
    print(certificate.report() + f"\n{out}: {len(data)} bytes; {certificate_path}")


def _write_claim(card: Path, certificate: Certificate, packed: Path) -> None:
    """Write the claim into the model card, in place of a former one."""
    lines = [line for line in card.read_text(encoding="utf-8").splitlines() if not line.startswith("Certified: ")]
    lines.append(f"Certified: {certificate.claim()} ({packed.name}; `peft-intrinsic verify` computes it again).")
    write_whole(card, "\n".join(lines) + "\n")


def _certify_sweep(args: argparse.Namespace) -> None:
    if not args.model or not args.out:
        raise ValueError("--dims needs --model, the base model, and --out, a folder.")
    training = (args.steps, args.finetune, args.lr, args.seed)
    rows = sweep(
        load_texts(args), args.dims, args.levels, args.out, *training, args.delta, bool(args.eval), args.num_tried
    )
    plot_sweep(rows, Path(args.out, "certificates.png"))
    print("| d | levels | bytes | bits with a table | with a prior | training error | test error | bound |")
    print("|---|---|---|---|---|---|---|---|")
    certificates = [Certificate.from_dict(row["certificate"]) for row in rows]
    for row, one in zip(rows, certificates, strict=True):
        test = "" if one.test_errors is None or not one.test_n else f"{one.test_errors / one.test_n:.4f}"
        cells = [row[name] for name in ("d", "levels", "bytes", "table_bits", "prior_bits")]
        print(f"| {' | '.join(map(str, cells))} | {one.risk:.4f} | {test} | {one.bound:.4f} |")
    best = min(certificates, key=lambda one: one.bound)
    print("\n" + best.report() + f"\nbest.pia, its certificate, sweep.json and certificates.png in {args.out}")


def verify(args: argparse.Namespace) -> None:
    """Compute a certificate again, and compare."""
    path = Path(args.file)
    adapter = read_packed(path)
    texts = load_texts(args, adapter.base, get_labels(path, adapter))
    claimed, computed, differences = verify_certificate(path, texts)
    print(computed.report())
    if claimed.test_n is not None:
        held_out = f"test_errors={claimed.test_errors} of test_n={claimed.test_n}"
        print(f"{held_out} were not counted again: verify has no data for evaluation.")
    if differences:
        raise ValueError(f"{path} does not bear out the certificate beside it. " + "; ".join(differences) + ".")
    print("Agrees with the certificate beside it.")
