"""The commands pack, unpack, certify and verify."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any


def add_commands(commands: Any) -> None:
    """Add them to the parser of the command."""
    pack = commands.add_parser("pack", help="an adapter as a file of about a hundred bytes")
    pack.set_defaults(run=_later("pack"))
    pack.add_argument("adapter", help="folder of the adapter, or its name on the Hub")
    pack.add_argument("-o", "--out", required=True, help="the packed adapter, x.pia")
    limit = pack.add_mutually_exclusive_group()
    limit.add_argument("--levels", type=int, help="values that the numbers may have (8)")
    limit.add_argument("--max-bytes", type=int, help="instead: as many values as fit into so many bytes")
    limit.add_argument("--max-error", type=float, help="instead: share of the numbers' norm that rounding may change")
    pack.add_argument("--model", help="the base model, where it lies elsewhere than the adapter says")
    pack.add_argument("--labels", type=int, help="of the base model's head (as its configuration says)")
    pack.add_argument("--text-form", action="store_true", help="print it as text too, for a URL or a database")
    pack.add_argument("--qr", help="draw it as a QR code, PNG or SVG")
    pack.add_argument("--eval", help="labelled texts: report the accuracy before and after")
    pack.add_argument("--train", help="labelled texts for --finetune")
    pack.add_argument(
        "--finetune", type=int, default=0, metavar="STEPS", help="train on as rounded (0; needs --levels)"
    )
    pack.add_argument("--lr", type=float, default=2e-4, help="of training; --finetune has a tenth (2e-4)")
    _add_columns(pack)
    unpack = commands.add_parser("unpack", help="a packed adapter as a folder that PEFT loads")
    unpack.set_defaults(run=_later("unpack"))
    unpack.add_argument("file", help="the packed adapter")
    unpack.add_argument("-o", "--out", required=True, help="folder, new or empty")
    unpack.add_argument("--model", help="the base model, where it lies elsewhere than the adapter says")
    certify = commands.add_parser("certify", help="a bound on the error on new examples, from the training examples")
    certify.set_defaults(run=_later("certify"))
    certify.add_argument("--adapter", help="folder or packed adapter (x.pia) that was trained on these data")
    certify.add_argument(
        "--dims", type=_numbers, help="instead: train adapters of these d and certify the best, 100,200"
    )
    certify.add_argument(
        "--levels", type=_numbers, default=[8], help="values of the numbers, one or several to try (8)"
    )
    certify.add_argument(
        "--tried", type=int, default=1, help="combinations of d, seed, rate and steps tried before (1)"
    )
    certify.add_argument("--delta", type=float, default=0.05, help="probability that the bound fails (0.05)")
    certify.add_argument("--train", required=True, help="the training data: CSV, TSV, JSON lines or Parquet")
    certify.add_argument("--test", help="data that had no part in any choice, to compare")
    certify.add_argument("--model", help="the base model; needed with --dims")
    certify.add_argument("-o", "--out", help="x.pia (beside the adapter); with --dims a folder, in which it resumes")
    certify.add_argument("--steps", type=int, default=1000, help="of training, with --dims (1000)")
    certify.add_argument("--finetune", type=int, default=0, metavar="STEPS", help="train on as rounded (0)")
    certify.add_argument("--lr", type=float, default=2e-4, help="of training; --finetune has a tenth (2e-4)")
    certify.add_argument("--seed", type=int, default=0, help="with --dims (0)")
    _add_columns(certify)
    verify = commands.add_parser("verify", help="compute a certificate again, from the packed adapter and the data")
    verify.set_defaults(run=_later("verify"))
    verify.add_argument("file", help="the packed adapter, its certificate beside it")
    verify.add_argument("--train", required=True, help="the training data")
    verify.add_argument("--model", help="the base model, where it lies elsewhere than the adapter says")
    _add_columns(verify)


def _add_columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", nargs="+", default=["text"], help="column of the text, or two for pairs (text)")
    parser.add_argument("--label", default="label", help="column of the label (label)")
    parser.add_argument("--batch", type=int, default=32, help="batch size (32)")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas between them.") from None


def _later(name: str) -> Callable[[argparse.Namespace], None]:
    """A function of `bounds.command`, imported when it is called: the help is there at once, and without the extras."""

    def run(args: argparse.Namespace) -> None:
        try:
            module = import_module(".bounds.command", __package__)
        except ImportError as error:
            raise RuntimeError(f"{error}. pip install peft_intrinsic[codec,measure]") from None
        getattr(module, name)(args)

    return run
