"""The commands pack, unpack, certify, verify, trajectory and distance."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any

LABELS = "number of labels of the base model's head, where the adapter does not store it"


def add_commands(commands: Any) -> None:
    """Add them to the parser of the command."""
    pack = commands.add_parser("pack", help="an adapter as a file of about a hundred bytes")
    pack.set_defaults(run=_later("pack", "pack"))
    pack.add_argument("adapter", help="folder of the adapter, or its name on the Hub")
    pack.add_argument("-o", "--out", required=True, help="the packed adapter, x.pia")
    limit = pack.add_mutually_exclusive_group()
    limit.add_argument("--levels", type=int, help="values that the numbers may have (8)")
    limit.add_argument("--max-bytes", type=int, help="instead: as many values as fit into so many bytes")
    limit.add_argument("--max-error", type=float, help="instead: share of the numbers' norm that rounding may change")
    pack.add_argument("--model", help="the base model, where it lies elsewhere than the adapter says")
    pack.add_argument("--labels", type=int, help=LABELS)
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
    unpack.set_defaults(run=_later("pack", "unpack"))
    unpack.add_argument("file", help="the packed adapter")
    unpack.add_argument("-o", "--out", required=True, help="folder, new or empty")
    unpack.add_argument("--model", help="the base model, where it lies elsewhere than the adapter says")
    certify = commands.add_parser("certify", help="a bound on the error on new examples, from the training examples")
    certify.set_defaults(run=_later("certify", "certify"))
    certify.add_argument("--adapter", help="folder or packed adapter (x.pia) that was trained on these data")
    certify.add_argument(
        "--dims", type=_numbers, help="instead: train adapters of these d and certify the best, 100,200"
    )
    certify.add_argument(
        "--levels", type=_numbers, default=[8], help="values of the numbers, one or several to try (8)"
    )
    certify.add_argument(
        "--num-tried",
        type=int,
        default=1,
        help="combinations of d, seed, rate and steps tried before, times those of --levels or of the folder (1)",
    )
    certify.add_argument("--delta", type=float, default=0.05, help="probability that the bound fails (0.05)")
    certify.add_argument("--train", required=True, help="the training data: CSV, TSV, JSON lines or Parquet")
    certify.add_argument("--eval", help="data that had no part in any choice, to compare")
    certify.add_argument("--model", help="the base model; needed with --dims")
    certify.add_argument(
        "-o", "--out", help="x.pia (beside the adapter); with --dims a folder, whose adapters all count"
    )
    certify.add_argument("--steps", type=int, default=1000, help="of training, with --dims (1000)")
    certify.add_argument("--finetune", type=int, default=0, metavar="STEPS", help="train on as rounded (0)")
    certify.add_argument("--lr", type=float, default=2e-4, help="of training; --finetune has a tenth (2e-4)")
    certify.add_argument("--seed", type=int, default=0, help="with --dims (0)")
    _add_columns(certify)
    verify = commands.add_parser("verify", help="compute a certificate again, from the packed adapter and the data")
    verify.set_defaults(run=_later("certify", "verify"))
    verify.add_argument("file", help="the packed adapter, its certificate beside it")
    verify.add_argument("--train", required=True, help="the training data")
    verify.add_argument("--model", help="the base model, where it lies elsewhere than the adapter says")
    _add_columns(verify)
    _add_trajectory(commands)
    distance = commands.add_parser("distance", help="how far a fine-tuned model, or an adapter, is from its base")
    distance.set_defaults(run=_later("distance", "distance"))
    distance.add_argument("base", help="folder or safetensors file of the base model, or its name on the Hub")
    distance.add_argument("tuned", help="likewise, of the fine-tuned model or of an adapter")
    distance.add_argument("--threshold", type=float, default=1e-3, help="above which an entry counts as moved (0.001)")
    distance.add_argument(
        "--ignore-missing", action="store_true", help="leave out what only one side has, such as a head"
    )
    distance.add_argument("--labels", type=int, help=LABELS)
    distance.add_argument("-o", "--out", help="folder for distance.json, distance.md and distance.png")


def _add_trajectory(commands: Any) -> None:
    trajectory = commands.add_parser("trajectory", help="subspaces learnt from the way that a fine-tuning takes")
    actions = trajectory.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=text)
        parser.set_defaults(run=_later("trajectory", name))
        return parser

    def training(parser: argparse.ArgumentParser, rate: float) -> None:
        parser.add_argument("--model", required=True, help="the base model, or its folder")
        parser.add_argument("--train", required=True, help="labelled texts: CSV, TSV, JSON lines or Parquet")
        parser.add_argument("--steps", type=int, default=1000, help="of training (1000)")
        parser.add_argument("--lr", type=float, default=rate, help=f"its learning rate ({rate:g})")
        parser.add_argument("--seed", type=int, default=0, help="of the order of the data (0)")
        _add_columns(parser)

    record = action("record", "fine-tune in full and keep snapshots; the same command goes on where it stopped")
    training(record, 5e-5)
    record.add_argument("-o", "--out", required=True, help="folder of the recording")
    record.add_argument("--every", type=int, help="steps between snapshots (an epoch)")
    record.add_argument("--parameters", help="regular expression for whole names (all of numbered blocks)")
    fit = action("fit", "the subspace that snapshots span")
    fit.add_argument("snapshots", nargs="+", help="folders of recordings, or single snapshots")
    fit.add_argument("-o", "--out", required=True, help="the subspace, x.safetensors")
    fit.add_argument("--dim", type=int, required=True, help="directions of every layer, or of the model")
    fit.add_argument("--per", choices=["layer", "model"], default="layer", help="what shares one θ (layer)")
    fit.add_argument("--center", action="store_true", help="principal components: take the snapshots' mean off")
    fit.add_argument("--bfloat16", action="store_true", help="store the directions in half the room")
    tune = action("tune", "an adapter in a subspace")
    training(tune, 2e-4)
    tune.add_argument("--subspace", required=True, help="the file that fit wrote")
    tune.add_argument("-d", type=int, help="numbers in the subspace (all that it has)")
    tune.add_argument(
        "--modules-to-save", type=names, help="modules to train and save in full, such as classifier,embeddings"
    )
    tune.add_argument("--ensemble", type=int, help="start at the mean of so many random vectors")
    tune.add_argument("--embed", action="store_true", help="save the subspace with the adapter")
    tune.add_argument("--eval", help="labelled texts to score on")
    tune.add_argument("-o", "--out", required=True, help="folder of the adapter")
    outliers = action("outliers", "weights that an adapter moves far; with --eval, what they are worth")
    training(outliers, 5e-5)
    outliers.add_argument("adapter", help="folder of the adapter")
    outliers.add_argument("-k", type=float, default=3.0, help="standard deviations (3)")
    outliers.add_argument("--eval", help="labelled texts: fine-tune in full without them, and score")
    outliers.add_argument("-o", "--out", required=True, help="folder for outliers.md, outliers.png and trials")
    transfer = action("transfer", "one task in the subspaces of others; the same command goes on where it stopped")
    training(transfer, 2e-4)
    transfer.add_argument("recordings", nargs="+", help="folders of recordings, one for each task")
    transfer.add_argument("--source-task", help="which of them is of the task itself")
    transfer.add_argument("--dim", type=int, default=32, help="directions of every layer, as far as there are (32)")
    transfer.add_argument(
        "--modules-to-save", type=names, help="modules to train in full, such as classifier,embeddings"
    )
    transfer.add_argument("--eval", required=True, help="labelled texts to score on")
    transfer.add_argument("-o", "--out", required=True, help="folder for transfer.md and trials")


def _add_columns(parser: argparse.ArgumentParser) -> None:
    add_text_and_label(parser.add_argument)
    parser.add_argument("--batch", type=int, default=32, help="batch size (32)")


def add_text_and_label(add: Any) -> None:
    """The columns of labelled texts."""
    add("--text", type=names, default=["text"], help="column of the text, or two with a comma for pairs (text)")
    add("--label", default="label", help="column of the label (label)")


def names(text: str) -> list[str]:
    """Several names in one value: an option that takes several values would swallow what follows it."""
    return text.split(",")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas between them.") from None


def _later(module: str, name: str) -> Callable[[argparse.Namespace], None]:
    """A function of a module of `commands`, imported when it is called: the help needs no extras."""

    def run(args: argparse.Namespace) -> None:
        try:
            commands = import_module(f"peft_intrinsic.commands.{module}")
        except ImportError as error:
            from peft_intrinsic.version import pip_install

            raise RuntimeError(f"{error}. {pip_install('[codec,measure]')}") from None
        getattr(commands, name)(args)

    return run
