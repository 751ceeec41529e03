"""The commands certify and verify."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..bounds.certify import (
    AnyCertificate,
    AnyTexts,
    check_num_tried,
    compute_digest,
    make_certificate,
    pack_adapter,
    parse_certificate,
    read_certificate,
    verify_certificate,
    write_certified,
)
from ..bounds.formulas import check
from ..bounds.language import ALPHAS, LanguageCertificate
from ..bounds.sweep import plot_sweep, sweep
from ..card import CLAIM
from ..codec import read_packed
from ..codec.adapter import DEFAULT_LEVELS
from ..trials.store import write_whole
from .inputs import get_labels, load_documents, load_texts, prepare_output_file, read_adapter_config, read_scores


def certify(args: argparse.Namespace) -> None:
    """Certify one adapter, or the best of a sweep."""
    check(num_tried=args.num_tried, delta=args.delta)
    for alpha in args.alpha or ():
        check(alpha=alpha)
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
        texts = _load(args, adapter.options["task_type"], adapter.base, get_labels(source, adapter))
        candidates = [source.read_bytes()]
    else:
        config = read_adapter_config(args.adapter)
        out = prepare_output_file("--out", args.out or source / "adapter.pia")
        texts = _load(
            args, config.task_type, config.base_model_name_or_path, config.num_labels, **read_scores(args.adapter)
        )
        candidates = pack_adapter(texts, args.adapter, args.levels, args.finetune, args.lr)
    paths = [source, out] if source.is_file() else [out]
    check_num_tried(paths, candidates, texts, args.num_tried, len(candidates))
    num_tried = args.num_tried * len(candidates)
    certified = [(make_certificate(data, texts, num_tried, args.delta, bool(args.eval)), data) for data in candidates]
    certificate, data = min(certified, key=lambda pair: pair[0].bound)
    certificate_path = write_certified(out, data, certificate, texts, source)
    if source.is_dir() and (source / "README.md").is_file():
        _write_claim(source / "README.md", certificate, out)
    print(certificate.report())
    print(f"Of every text, the first {texts.training.options.max_length} tokens were read (--max-length).")
    print(f"{out}: {len(data)} bytes; {certificate_path}")


def _load(
    args: argparse.Namespace, own: str | None, named: str | None = None, labels: int | None = None, **trained: Any
) -> AnyTexts:
    """Load the training data, for the task type of the adapter, which `--task-type` may repeat.

    `trained` is what `read_scores` found of a classifier.
    """
    own = getattr(own, "value", own)
    if own and args.task_type and own != args.task_type:
        raise ValueError(f"--task-type {args.task_type}: the adapter is for {own}. Leave the option out.")
    task_type = own or args.task_type or "SEQ_CLS"
    if task_type not in ("SEQ_CLS", "CAUSAL_LM"):
        raise ValueError(f"The adapter is for {task_type}. Certificates exist for SEQ_CLS and CAUSAL_LM.")
    given = {name: value for name in ("alpha", "sample") if (value := getattr(args, name)) is not None}
    if task_type == "CAUSAL_LM":
        length = {} if args.max_length is None else {"max_length": args.max_length}
        texts: AnyTexts = load_documents(args, named, **{"alphas": given.pop("alpha", ALPHAS), **given, **length})
    elif given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{names}: only for language models, --task-type CAUSAL_LM. Leave the option out.")
    else:
        texts = load_texts(args, named, labels, **trained)
    data = texts.task.data
    if args.eval and compute_digest(data["eval"]) == compute_digest(data["train"]):
        raise ValueError(f"--eval {args.eval} is the training data. Pass other data, or leave it out.")
    return texts


def _write_claim(card: Path, certificate: AnyCertificate, packed: Path) -> None:
    """Write the claim into the model card, in place of a former one."""
    lines = [line for line in card.read_text(encoding="utf-8").splitlines() if not line.startswith(CLAIM)]
    lines.append(f"{CLAIM}{certificate.claim()} ({packed.name}; `peft-intrinsic verify` computes it again).")
    write_whole(card, "\n".join(lines) + "\n")


def _certify_sweep(args: argparse.Namespace) -> None:
    if not args.model or not args.out:
        raise ValueError("--dims needs --model, the base model, and --out, a folder.")
    training = (args.steps, args.finetune, args.lr, args.seed)
    rows = sweep(
        _load(args, None), args.dims, args.levels, args.out, *training, args.delta, bool(args.eval), args.num_tried
    )
    plot_sweep(rows, Path(args.out, "certificates.png"))
    certificates = [parse_certificate(row["certificate"]) for row in rows]
    error = "loss" if isinstance(certificates[0], LanguageCertificate) else "error"
    print(f"| d | levels | bytes | bits with a table | with a prior | training {error} | test {error} | bound |")
    print("|---|---|---|---|---|---|---|---|")
    for row, one in zip(rows, certificates, strict=True):
        cells = [row[name] for name in ("d", "levels", "bytes", "table_bits", "prior_bits")]
        test = _get_test_risk(one)
        shown = "" if test is None else f"{test:.4f}"
        print(f"| {' | '.join(map(str, cells))} | {one.risk:.4f} | {shown} | {one.bound:.4f} |")
    best = min(certificates, key=lambda one: one.bound)
    print("\n" + best.report() + f"\nbest.pia, its certificate, sweep.json and certificates.png in {args.out}")


def _get_test_risk(certificate: AnyCertificate) -> float | None:
    if isinstance(certificate, LanguageCertificate):
        return certificate.test_risk
    if certificate.test_errors is None or certificate.test_n is None:
        return None
    return certificate.test_errors / certificate.test_n


def verify(args: argparse.Namespace) -> None:
    """Compute a certificate again, and compare."""
    path = Path(args.file)
    adapter = read_packed(path)
    stored, content = read_certificate(path)
    if isinstance(stored, LanguageCertificate):
        documents = load_documents(args, adapter.base, alphas=stored.alphas, max_length=content["max_length"])
        documents.sample = min(stored.n, len(documents.data["train"]))  # other data have another digest
        texts: AnyTexts = documents
    else:
        texts = load_texts(args, adapter.base, get_labels(path, adapter), max_length=content["max_length"])
    claimed, computed, differences = verify_certificate(path, texts)
    print(computed.report())
    if claimed.test_n is not None:
        test = (
            f"test_risk={claimed.test_risk}"
            if isinstance(claimed, LanguageCertificate)
            else f"test_errors={claimed.test_errors}"
        )
        print(f"{test} of test_n={claimed.test_n} were not counted again: verify has no data for evaluation.")
    if differences:
        raise ValueError(f"{path} does not bear out the certificate beside it. " + "; ".join(differences) + ".")
    print("Agrees with the certificate beside it.")
