"""Parser of info."""

from __future__ import annotations

from typing import Any

from .parsing import LABELS, add_command


def add_parsers(commands: Any) -> None:
    """Add the subcommand to the parser of the command."""
    parser = add_command(
        commands,
        "info",
        "info.info",
        "Print what an adapter is, and whether it fits a base model",
        "info runs/classifier --model bert-base-uncased",
        "The exit status is 0 where it fits and 1 where it does not.",
    )
    parser.add_argument("adapter", help="folder of the adapter, its name on the Hub, or a packed adapter (x.pia)")
    parser.add_argument(
        "--model", help="base model to compare with (default: the one that the adapter names, if it is on this machine)"
    )
    parser.add_argument("--labels", type=int, help=LABELS)
