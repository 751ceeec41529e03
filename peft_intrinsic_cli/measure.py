"""Parsers of measure, advise, study and analyze."""

from __future__ import annotations

import argparse
from typing import Any

from .parsing import MODEL, add_command, add_data, add_epochs, parse_integers, parse_model, parse_names

METHODS = ("did", "said", "default", "lora", "lora-rank", "unilora", "tinylora")


def add_parsers(commands: Any) -> None:
    """Add the subcommands to the parser of the command."""
    parser = add_command(
        commands,
        "measure.measure",
        "Measure the intrinsic dimension (d90) of a task",
        "measure --model bert-base-uncased --task glue/mrpc --out runs/mrpc",
        "d90 is the smallest d at which training in a subspace of d dimensions reaches 90 %\nof the score of full "
        "fine-tuning. The same command resumes a stopped run.",
    )
    parser.add_argument("--model", required=True, type=parse_model, help=MODEL)
    parser.add_argument(
        "--method",
        default="did",
        choices=METHODS,
        help="what is trained: the paper's subspaces of all weights (did, said), a subspace of norms and biases "
        "(default), or a method of PEFT, of which lora-rank has the rank as d (default: did)",
    )
    _add_options(parser)
    _add_advise(commands)
    parser = add_command(
        commands,
        "measure.study",
        "Measure and compare the d90 of several models or methods",
        "study methods bert-base-uncased --method did,lora --task glue/mrpc --out runs/study",
        "methods     d90 of each method on the same models\n"
        "models      d90 against the number of parameters of the models\n"
        "checkpoints d90 during pretraining, over the number in the name of each folder\n"
        "gap         d90 against the generalization gap",
    )
    add = parser.add_argument
    add("kind", choices=["checkpoints", "models", "methods", "gap"], help="comparison to make")
    add("models", nargs="+", type=parse_model, metavar="MODEL", help="base models: names on the Hub, or folders")
    trained = f"what is trained, of {', '.join(METHODS)} (default: did, and did,said for methods)"
    add("--method", type=parse_names, metavar="METHOD[,METHOD]", help=trained)
    _add_options(parser)
    parser = add_command(
        commands,
        "measure.analyze",
        "Re-analyze the stored trials of a run without training",
        "analyze runs/mrpc --target 0.95 --out runs/mrpc_95",
        "Options that are left out stay as they were in the run.",
    )
    parser.add_argument("folder", metavar="RUN", help="folder that measure wrote")
    parser.add_argument("--out", metavar="FOLDER", help="folder of the new report (default: RUN)")
    _add_question(parser.add_argument, " (default: as in the run)")
    parser.set_defaults(dims=None, target=None, center=None)


def _add_advise(commands: Any) -> None:
    parser = add_command(
        commands,
        "measure.advise",
        "Advise the smallest LoRA rank, and the smallest d, that are large enough for a task",
        "advise --model bert-base-uncased --task glue/mrpc --out runs/advice",
        "Both reach a fraction of the score of full fine-tuning, and have an interval. LoRA adapts\nqueries and "
        "values and trains the head; d is that of IntrinsicConfig. The same command\nresumes a stopped run.",
    )
    parser.add_argument("--model", required=True, type=parse_model, help=MODEL)
    ranks = "ranks to choose from"
    parser.add_argument("--ranks", type=parse_integers, default="1,2,4,8,16,32,64", metavar="R[,R]", help=ranks)
    _add_options(parser)
    parser.set_defaults(dims="64,16384,9")


def _add_question(add: Any, default: str = "") -> None:
    """Add the options that define d90. `default` ends each help, where the defaults are not those stated here."""
    grid = f"grid of d: lowest, highest, number of points{default}"
    add("--dims", type=_parse_dims, default="100,1000000,64", metavar="LOW,HIGH,POINTS", help=grid)
    add("--target", type=float, default=0.9, help=f"fraction of full fine-tuning to reach{default}")
    score = "what --target is a fraction of: the score, or its gain over the majority class"
    add("--relative-to", choices=["score", "gain"], help=score + (default or " (default: score; gain for a loss)"))
    center = f"aggregate over seeds: median of the runs that did not collapse, or mean of all{default}"
    add("--center", choices=["median", "mean"], default="median", help=center)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    add = parser.add_argument_group("training").add_argument
    tried: dict[str, Any] = {"type": _parse_learning_rates, "default": "auto", "metavar": "LR[,LR]"}
    full = "learning rates to try for full fine-tuning, such as 1e-5,3e-5,1e-4"
    add("--full-learning-rates", help=full, **tried)
    add("--learning-rates", help="learning rates to try for the method, equally many", **tried)
    add_epochs(add)
    add("--patience", type=int, metavar="EPOCHS", help="epochs without a better score after which a trial stops")
    add("--config", metavar="FILE", help="YAML file of further TrainingArguments, which override the options above")
    add = parser.add_argument_group("search").add_argument
    add("--out", required=True, metavar="FOLDER", help="folder of the run; the same command resumes a stopped run")
    add("--overwrite", action="store_true", help="discard the run that the folder holds")
    add("--dry-run", action="store_true", help="check all options and print the plan without training")
    _add_question(add)
    add("--seeds", type=int, default=3, help="seeds at each d")
    add("--baseline-seeds", type=int, help="seeds of full fine-tuning (default: 3, and more where they narrow d90)")
    add("--trials", type=int, help="largest number of trials (default: 60; unlimited with --sweep)")
    add("--minutes", type=float, help="time budget in minutes, after which no new trial starts (default: unlimited)")
    add("--sweep", action="store_true", help="measure the whole grid")
    add = parser.add_argument_group("execution").add_argument
    add("--engine", default="process", choices=["process", "ray"], help="run trials in this process, or on Ray")
    add("--ray-address", help="address of a running Ray cluster (default: a new one on this machine)")
    add("--cpus", type=float, default=1, help="CPUs of a trial on Ray")
    add("--gpus", type=float, default=0, help="GPUs of a trial on Ray, or a fraction of one")
    launcher = "launcher of each trial, such as 'accelerate launch --num_processes 2 --main_process_port 0'"
    add("--launch", metavar="COMMAND", help=launcher)


def _parse_learning_rates(text: str) -> Any:
    """Parse `auto`, or learning rates with commas between them."""
    try:
        return text if text == "auto" else [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither 'auto' nor learning rates such as 5e-5,2e-4,8e-4."
        ) from None


def _parse_dims(text: str) -> list[int]:
    """Parse the lowest d, the highest d and the number of points of a grid."""
    try:
        low, high, points = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not lowest,highest,points.") from None
    return [low, high, points]
