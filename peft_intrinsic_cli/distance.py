"""Parser of distance."""

from __future__ import annotations

from typing import Any

from .parsing import LABELS, add_command


def add_parsers(commands: Any) -> None:
    """Add the subcommand to the parser of the command."""
    parser = add_command(
        commands,
        "distance",
        "distance.distance",
        "Compute the distance of a fine-tuned model or an adapter from its base model",
        "distance bert-base-uncased runs/classifier -o runs/distance",
    )
    parser.add_argument("base", help="base model: a folder, a safetensors file, or a name on the Hub")
    parser.add_argument("tuned", help="fine-tuned model or adapter, in the same form")
    parser.add_argument("--threshold", type=float, default=1e-3, help="change above which an entry counts as changed")
    parser.add_argument(
        "--ignore-missing", action="store_true", help="ignore parameters of one model only, such as a head"
    )
    parser.add_argument("--labels", type=int, help=LABELS)
    parser.add_argument("-o", "--out", metavar="FOLDER", help="folder for distance.json, distance.md and distance.png")
