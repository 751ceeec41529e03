"""Parsers of certify and verify."""

from __future__ import annotations

from typing import Any

from .parsing import FILE, MODEL, add_batch, add_columns, add_command, add_learning_rate, parse_integers


def add_parsers(commands: Any) -> None:
    """Add the subcommands to the parser of the command."""
    parser = add_command(
        commands,
        "certify",
        "certify.certify",
        "Bound the error of an adapter on new examples",
        "certify --adapter runs/classifier --train train.csv",
        "The bound needs no held-out data: it counts the errors on the training examples\n"
        "and the bits of the packed adapter.",
    )
    parser.add_argument("--adapter", help="folder or packed adapter (x.pia) that was trained on the training data")
    parser.add_argument(
        "--dims", type=parse_integers, metavar="D[,D]", help="instead, values of d: adapters to train and select from"
    )
    parser.add_argument(
        "--levels", type=parse_integers, default="8", metavar="N[,N]", help="numbers of values to quantize θ to"
    )
    parser.add_argument(
        "--num-tried",
        type=int,
        default=1,
        metavar="N",
        help="combinations of d, seed, learning rate and steps that were tried on these data; the command multiplies "
        "them by its own",
    )
    parser.add_argument("--delta", type=float, default=0.05, help="probability that the bound fails")
    parser.add_argument("--train", required=True, metavar="FILE", help=f"training data: a {FILE}")
    parser.add_argument("--eval", metavar="FILE", help="data that were used for no choice, to compare the bound with")
    parser.add_argument("--model", help=f"{MODEL}; required with --dims")
    parser.add_argument(
        "-o",
        "--out",
        help="packed adapter to write, or with --dims the folder of the sweep (default: beside the adapter)",
    )
    parser.add_argument("--steps", type=int, default=1000, help="training steps, with --dims")
    parser.add_argument("--finetune", type=int, default=0, metavar="STEPS", help="steps of quantization-aware training")
    add_learning_rate(parser.add_argument, 2e-4, "; --finetune uses a tenth of it")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training, with --dims")
    add_columns(parser.add_argument)
    add_batch(parser.add_argument)
    parser = add_command(
        commands,
        "verify",
        "certify.verify",
        "Verify a certificate against its packed adapter and the training data",
        "verify runs/classifier/adapter.pia --train train.csv",
        "All figures of the certificate are computed again.",
    )
    parser.add_argument("file", help="packed adapter (x.pia) with its certificate beside it")
    parser.add_argument("--train", required=True, metavar="FILE", help=f"training data: a {FILE}")
    parser.add_argument("--model", help=MODEL)
    add_columns(parser.add_argument)
    add_batch(parser.add_argument)
