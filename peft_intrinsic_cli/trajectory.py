"""Parsers of trajectory and its actions."""

from __future__ import annotations

from typing import Any

from .parsing import MODEL, add_command, add_learning_rate, add_texts, parse_model, parse_names


def add_parsers(commands: Any) -> None:
    """Add the subcommand and its actions to the parser of the command."""
    trajectory = add_command(
        commands,
        "trajectory",
        "Learn subspaces from the trajectory of a fine-tuning run",
        "trajectory record --model bert-base-uncased --train train.csv -o runs/recording",
    )
    actions = trajectory.add_subparsers(required=True, metavar="ACTION", title="actions")
    _add_record(actions)
    _add_fit(actions)
    _add_tune(actions)
    _add_outliers(actions)
    _add_transfer(actions)


def _add_training(add: Any, learning_rate: float) -> None:
    add("--model", required=True, type=parse_model, help=MODEL)
    add_texts(add)
    add("--steps", type=int, default=1000, help="training steps")
    add_learning_rate(add, learning_rate)
    add("--seed", type=int, default=0, help="seed of the order of the data")


def _add_modules(add: Any, verb: str) -> None:
    what = f"modules to {verb} fully, such as classifier,embeddings"
    add("--modules-to-save", type=parse_names, metavar="MODULE[,MODULE]", help=what)


def _add_record(actions: Any) -> None:
    add = add_command(
        actions,
        "trajectory.record",
        "Fine-tune all weights and store snapshots of them",
        "trajectory record --model bert-base-uncased --train train.csv --every 50 -o runs/recording",
        "The same command resumes a stopped recording.",
    ).add_argument
    _add_training(add, 5e-5)
    add("-o", "--out", required=True, metavar="FOLDER", help="folder of the recording")
    add("--every", type=int, metavar="STEPS", help="steps between snapshots (default: one epoch)")
    names = "regular expression for whole names of the parameters to record (default: those in numbered blocks)"
    add("--parameters", metavar="REGEX", help=names)


def _add_fit(actions: Any) -> None:
    add = add_command(
        actions,
        "trajectory.fit",
        "Fit the subspace that snapshots span",
        "trajectory fit runs/recording --dim 8 -o subspace.safetensors",
    ).add_argument
    add("snapshots", nargs="+", help="folders of recordings, or single snapshots")
    add("-o", "--out", required=True, metavar="FILE", help="subspace to write (x.safetensors)")
    add("--dim", type=int, required=True, help="number of directions per layer, or of the model")
    add("--per", choices=["layer", "model"], default="layer", help="group of parameters that shares directions")
    add("--center", action="store_true", help="subtract the mean of the snapshots (principal components)")
    add("--bfloat16", action="store_true", help="store the directions in bfloat16, at half the size")


def _add_tune(actions: Any) -> None:
    add = add_command(
        actions,
        "trajectory.tune",
        "Train an adapter in a fitted subspace",
        "trajectory tune --model bert-base-uncased --train train.csv --eval test.csv\n"
        "--subspace subspace.safetensors -o runs/adapter",
    ).add_argument
    _add_training(add, 2e-4)
    add("--subspace", required=True, metavar="FILE", help="subspace that fit wrote")
    add("-d", type=int, help="number of trainable parameters (default: all that the subspace has)")
    _add_modules(add, "train and save")
    add("--ensemble", type=int, metavar="H", help="start θ at the mean of H random vectors")
    add("--embed", action="store_true", help="save the subspace with the adapter")
    add("--eval", metavar="FILE", help="held-out data to report the accuracy on")
    add("-o", "--out", required=True, metavar="FOLDER", help="folder of the adapter")
    add("--overwrite", action="store_true", help="replace the adapter that the folder holds")


def _add_outliers(actions: Any) -> None:
    add = add_command(
        actions,
        "trajectory.outliers",
        "Find the weights that an adapter changes most",
        "trajectory outliers runs/adapter --model bert-base-uncased --train train.csv -o runs/outliers",
        "With --eval, models are fine-tuned without them, to see what they contribute.",
    ).add_argument
    _add_training(add, 5e-5)
    add("adapter", help="folder of the adapter")
    add("-k", type=float, default=3.0, help="standard deviations beyond which a weight counts as an outlier")
    add("--eval", metavar="FILE", help="held-out data to score fine-tuning without the outliers on")
    add("-o", "--out", required=True, metavar="FOLDER", help="folder for outliers.md, outliers.png and trials")


def _add_transfer(actions: Any) -> None:
    add = add_command(
        actions,
        "trajectory.transfer",
        "Train one task in the subspaces of other tasks",
        "trajectory transfer runs/mrpc runs/rte --model bert-base-uncased\n"
        "--train train.csv --eval test.csv -o runs/transfer",
        "The same command resumes a stopped run.",
    ).add_argument
    _add_training(add, 2e-4)
    add("recordings", nargs="+", help="folders of recordings, one for each task")
    add("--source-task", metavar="RECORDING", help="recording of the task itself")
    add("--dim", type=int, default=32, help="largest number of directions per layer")
    _add_modules(add, "train")
    add("--eval", required=True, metavar="FILE", help="held-out data to score on")
    add("-o", "--out", required=True, metavar="FOLDER", help="folder for transfer.md and trials")
