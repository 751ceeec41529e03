"""Parsers of pack and unpack."""

from __future__ import annotations

from typing import Any

from .parsing import FILE, LABELS, MODEL, add_batch, add_columns, add_command, add_learning_rate


def add_parsers(commands: Any) -> None:
    """Add the subcommands to the parser of the command."""
    parser = add_command(
        commands,
        "pack",
        "pack.pack",
        "Pack an adapter into a file of about a hundred bytes",
        "pack runs/classifier -o classifier.pia --levels 8 --eval test.csv",
        "θ is quantized to a few values and entropy-coded.",
    )
    parser.add_argument("adapter", help="folder of the adapter, or its name on the Hub")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="packed adapter to write (x.pia)")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--levels", type=int, help="number of values that θ is quantized to (default: 8)")
    limit.add_argument("--max-bytes", type=int, help="instead, the size that the file may have")
    limit.add_argument("--max-error", type=float, help="instead, the rounding error allowed, relative to the norm of θ")
    parser.add_argument("--model", help=MODEL)
    parser.add_argument("--labels", type=int, help=LABELS)
    parser.add_argument("--text-form", action="store_true", help="print the packed adapter as URL-safe text too")
    parser.add_argument("--qr", metavar="FILE", help="QR code to draw, as PNG or SVG")
    parser.add_argument("--eval", metavar="FILE", help=f"held-out data to report the accuracy on: a {FILE}")
    parser.add_argument("--train", metavar="FILE", help="training data for --finetune, in the same form")
    parser.add_argument(
        "--finetune",
        type=int,
        default=0,
        metavar="STEPS",
        help="steps of quantization-aware training; needs --levels and --train",
    )
    add_learning_rate(parser.add_argument, 2e-4, "; --finetune uses a tenth of it")
    add_columns(parser.add_argument)
    add_batch(parser.add_argument)
    parser = add_command(
        commands,
        "unpack",
        "pack.unpack",
        "Unpack a packed adapter into a folder that PEFT loads",
        "unpack classifier.pia -o runs/again",
    )
    parser.add_argument("file", help="packed adapter (x.pia)")
    parser.add_argument("-o", "--out", required=True, metavar="FOLDER", help="folder to write, new or empty")
    parser.add_argument("--model", help=MODEL)
