"""Parser of train."""

from __future__ import annotations

from typing import Any

from .parsing import add_batch, add_command, add_data, add_epochs, add_learning_rate, parse_names


def add_parsers(commands: Any) -> None:
    """Add the subcommand to the parser of the command."""
    parser = add_command(
        commands,
        "train",
        "train.train",
        "Train an adapter and compare its score with baselines",
        "train --model bert-base-uncased --train train.csv --eval test.csv --out runs/classifier",
        "The scores before and after training stand beside that of the majority class and,\n"
        "for encoders, that of a logistic regression on their frozen features.",
    )
    parser.add_argument("--model", required=True, help="base model: a name on the Hub, or a folder")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the adapter")
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter that the folder holds")
    add_data(parser)
    add = parser.add_argument_group("adapter").add_argument
    add("--d", type=int, default=200, help="number of trainable parameters")
    add("--said", action="store_true", help="train a scale for each layer too, as part of the d parameters")
    add(
        "--target-modules",
        type=parse_names,
        metavar="MODULE[,MODULE]",
        help="modules to adapt beside the head: names such as query,value, or one of all, all-linear and "
        "norms-and-biases (default: norms-and-biases, or all where these have fewer than d weights)",
    )
    add = parser.add_argument_group("training").add_argument
    add_learning_rate(add, 2e-4)
    add_epochs(add)
    add_batch(add)
    add("--seed", type=int, default=0, help="seed of the projection and of the order of the data")
