"""What the parsers of all subcommands share: the form of the help, types of options, and common options."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

MODEL = "base model: a name on the Hub, or a folder"
FILE = "CSV, TSV, JSON lines or Parquet file"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Preserves the line breaks of descriptions and examples, and states the default of every option."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        stated = "(default:" in text or "(required" in text
        if stated or not action.option_strings or action.required or action.nargs == 0:
            return text
        return text + (" (default: none)" if action.default is None else " (default: %(default)s)")


def add_command(commands: Any, run: str, summary: str, example: str, more: str = "") -> argparse.ArgumentParser:
    """Add a subcommand.

    Args:
        commands: what `add_subparsers` returned.
        run: the function of the same name that carries it out, as `module.function` of `peft_intrinsic.commands`.
        summary: a verb phrase, without a full stop.
        example: the words of an example after `peft-intrinsic`, with line breaks where they help.
        more: further sentences of the description.

    Returns:
        The parser of the subcommand.
    """
    lines = example.replace("\n", " \\\n      ")
    parser = commands.add_parser(
        run.rpartition(".")[2],
        help=summary,
        description=f"{summary}.\n{more}".strip(),
        epilog=f"example:\n  peft-intrinsic {lines}",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe a task: its data, its metric and its type."""
    add = parser.add_argument_group("data").add_argument
    add("--task", help="task of GLUE on the Hub, such as glue/mrpc, instead of --train and --eval")
    train = f"training data: a {FILE}; with --dataset the name of a split (required without --task)"
    add("--train", metavar="FILE", help=train)
    add("--eval", metavar="FILE", help="held-out data, in the same form (required without --task)")
    add("--dataset", metavar="NAME[:CONFIGURATION]", help="dataset on the Hub of which --train and --eval name splits")
    add_columns(add)
    add(
        "--metric",
        help="score: accuracy, f1, matthews, spearman (regression), or a metric of evaluate by name or path; NAME:KEY "
        "selects one of several values (default: accuracy, or the metric of the GLUE task)",
    )
    add(
        "--task-type",
        default="SEQ_CLS",
        choices=["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM"],
        help="what the model predicts: a label per text, a label per word, or the next token",
    )
    add("--max-length", type=int, default=128, metavar="TOKENS", help="length at which inputs are truncated")


def add_columns(add: Any) -> None:
    """Add the options that name the columns of labeled texts."""
    text = "column of the texts, or two columns for pairs of texts"
    add("--text", type=parse_names, default="text", metavar="COLUMN[,COLUMN]", help=text)
    add("--label", default="label", metavar="COLUMN", help="column of the labels")


def add_texts(add: Any, train: str = f"training data: a {FILE}", required: bool = True, length: bool = True) -> None:
    """Add the options that name the file of the training data and its columns, length of a text and batch size."""
    add("--train", required=required, metavar="FILE", help=train)
    add_columns(add)
    if length:
        tokens = "tokens of a text that are read (default: as `train` recorded beside the adapter, or 128)"
        add("--max-length", type=int, metavar="TOKENS", help=tokens)
    add_batch(add)


def add_epochs(add: Any) -> None:
    """Add the options for the number of epochs and the batch size."""
    add("--epochs", type=float, default=3, help="epochs of training")
    add_batch(add)


def add_batch(add: Any) -> None:
    """Add the option for the batch size."""
    add("--batch-size", "--batch", dest="batch", type=int, default=32, help="batch size")


def add_learning_rate(add: Any, default: float, more: str = "") -> None:
    """Add the option for the learning rate of training."""
    add("--learning-rate", "--lr", dest="lr", type=float, default=default, help=f"learning rate of training{more}")


def parse_model(name: str) -> str:
    """Check that the name of a base model can be that of a folder with a model, or of a model on the Hub."""
    if Path(parse_weights(name), "config.json").is_file() or not Path(name).exists():
        return name
    raise argparse.ArgumentTypeError(
        f"{name} has no config.json, so it is not the folder of a model. Pass the folder of a saved model, or its name "
        "on the Hub."
    )


def parse_weights(name: str) -> str:
    """Check that the name of a base model is not that of an adapter, nor of a folder that does not exist.

    transformers would load the folder of an adapter with its own base model.
    """
    path, config = Path(name), Path(name, "adapter_config.json")
    if config.is_file():
        try:
            base = json.loads(config.read_bytes())["base_model_name_or_path"]
        except (ValueError, KeyError, TypeError):
            base = None
        remedy = f"Pass its base model, {base}" if base else "Pass its base model, which it does not name"
        raise argparse.ArgumentTypeError(f"{name} is the folder of an adapter. {remedy}.")
    if path.suffix == ".pia" and path.is_file():
        raise argparse.ArgumentTypeError(f"{name} is a packed adapter. Pass its base model; info prints its name.")
    if re.search(r"^[./~]|[\\:]|/.*/", name) and not path.exists():
        raise argparse.ArgumentTypeError(f"there is no folder {name}. Pass an existing one, or a name on the Hub.")
    return name


def parse_names(text: str) -> list[str]:
    """Split a value at its commas. (An option with several values would swallow the arguments that follow it.)"""
    return text.split(",")


def parse_integers(text: str) -> list[int]:
    """Parse integers with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas between them.") from None
