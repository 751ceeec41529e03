"""Parsers of trajectory and its actions."""

from __future__ import annotations

import argparse
from typing import Any

from .parsing import FILE, add_batch, add_columns, add_command, add_learning_rate, parse_names


def add_parsers(commands: Any) -> None:
    """Add the subcommand and its actions to the parser of the command."""
    trajectory = add_command(
        commands,
        "trajectory",
        "",
        "Learn subspaces from the trajectory of a fine-tuning run",
        "trajectory record --model bert-base-uncased --train train.csv -o runs/recording",
    )
    actions = trajectory.add_subparsers(required=True, metavar="ACTION", title="actions")
    _add_record(actions)
    _add_fit(actions)
    _add_tune(actions)
    _add_outliers(actions)
    _add_transfer(actions)


def _add_training(parser: argparse.ArgumentParser, learning_rate: float) -> None:
    parser.add_argument("--model", required=True, help="base model: a name on the Hub, or a folder")
    parser.add_argument("--train", required=True, metavar="FILE", help=f"training data: a {FILE}")
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    add_learning_rate(parser.add_argument, learning_rate)
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the data")
    add_columns(parser.add_argument)
    add_batch(parser.add_argument)


def _add_record(actions: Any) -> None:
    parser = add_command(
        actions,
        "record",
        "trajectory.record",
        "Fine-tune all weights and store snapshots of them",
        "trajectory record --model bert-base-uncased --train train.csv --every 50 -o runs/recording",
        "The same command resumes a stopped recording.",
    )
    _add_training(parser, 5e-5)
    parser.add_argument("-o", "--out", required=True, metavar="FOLDER", help="folder of the recording")
    parser.add_argument("--every", type=int, metavar="STEPS", help="steps between snapshots (default: one epoch)")
    parser.add_argument(
        "--parameters",
        metavar="REGEX",
        help="regular expression for whole names of the parameters to record (default: those in numbered blocks)",
    )


def _add_fit(actions: Any) -> None:
    parser = add_command(
        actions,
        "fit",
        "trajectory.fit",
        "Fit the subspace that snapshots span",
        "trajectory fit runs/recording --dim 8 -o subspace.safetensors",
    )
    parser.add_argument("snapshots", nargs="+", help="folders of recordings, or single snapshots")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="subspace to write (x.safetensors)")
    parser.add_argument("--dim", type=int, required=True, help="number of directions per layer, or of the model")
    parser.add_argument(
        "--per", choices=["layer", "model"], default="layer", help="group of parameters that shares directions"
    )
    parser.add_argument(
        "--center", action="store_true", help="subtract the mean of the snapshots (principal components)"
    )
    parser.add_argument("--bfloat16", action="store_true", help="store the directions in bfloat16, at half the size")


def _add_tune(actions: Any) -> None:
    parser = add_command(
        actions,
        "tune",
        "trajectory.tune",
        "Train an adapter in a fitted subspace",
        "trajectory tune --model bert-base-uncased --train train.csv --eval test.csv\n"
        "--subspace subspace.safetensors -o runs/adapter",
    )
    _add_training(parser, 2e-4)
    parser.add_argument("--subspace", required=True, metavar="FILE", help="subspace that fit wrote")
    parser.add_argument("-d", type=int, help="number of trainable parameters (default: all that the subspace has)")
    parser.add_argument(
        "--modules-to-save",
        type=parse_names,
        metavar="MODULE[,MODULE]",
        help="modules to train and save fully, such as classifier,embeddings",
    )
    parser.add_argument("--ensemble", type=int, metavar="H", help="start θ at the mean of H random vectors")
    parser.add_argument("--embed", action="store_true", help="save the subspace with the adapter")
    parser.add_argument("--eval", metavar="FILE", help="held-out data to report the accuracy on")
    parser.add_argument("-o", "--out", required=True, metavar="FOLDER", help="folder of the adapter")


def _add_outliers(actions: Any) -> None:
    parser = add_command(
        actions,
        "outliers",
        "trajectory.outliers",
        "Find the weights that an adapter changes most",
        "trajectory outliers runs/adapter --model bert-base-uncased --train train.csv -o runs/outliers",
        "With --eval, models are fine-tuned without them, to see what they contribute.",
    )
    _add_training(parser, 5e-5)
    parser.add_argument("adapter", help="folder of the adapter")
    parser.add_argument(
        "-k", type=float, default=3.0, help="standard deviations beyond which a weight counts as an outlier"
    )
    parser.add_argument("--eval", metavar="FILE", help="held-out data to score fine-tuning without the outliers on")
    parser.add_argument(
        "-o", "--out", required=True, metavar="FOLDER", help="folder for outliers.md, outliers.png and trials"
    )


def _add_transfer(actions: Any) -> None:
    parser = add_command(
        actions,
        "transfer",
        "trajectory.transfer",
        "Train one task in the subspaces of other tasks",
        "trajectory transfer runs/mrpc runs/rte --model bert-base-uncased\n"
        "--train train.csv --eval test.csv -o runs/transfer",
        "The same command resumes a stopped run.",
    )
    _add_training(parser, 2e-4)
    parser.add_argument("recordings", nargs="+", help="folders of recordings, one for each task")
    parser.add_argument("--source-task", metavar="RECORDING", help="recording of the task itself")
    parser.add_argument("--dim", type=int, default=32, help="largest number of directions per layer")
    parser.add_argument(
        "--modules-to-save",
        type=parse_names,
        metavar="MODULE[,MODULE]",
        help="modules to train fully, such as classifier,embeddings",
    )
    parser.add_argument("--eval", required=True, metavar="FILE", help="held-out data to score on")
    parser.add_argument("-o", "--out", required=True, metavar="FOLDER", help="folder for transfer.md and trials")
