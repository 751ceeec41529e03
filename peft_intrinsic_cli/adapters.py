"""Parsers of the subcommands for one adapter: train, info, distance, pack, unpack, certify and verify."""

from __future__ import annotations

import argparse
from typing import Any

from .parsing import (
    FILE,
    MODEL,
    add_command,
    add_data,
    add_epochs,
    add_learning_rate,
    add_texts,
    parse_integers,
    parse_model,
    parse_names,
    parse_weights,
)

FOUND = "base model, for adapters whose own name for it cannot be found"
PACKED = "packed adapter (x.pia)"


def add_parsers(commands: Any) -> None:
    """Add the subcommands to the parser of the command."""
    _add_train(commands)
    _add_info(commands)
    _add_distance(commands)
    _add_pack(commands)
    _add_certify(commands)


def _add_train(commands: Any) -> None:
    parser = add_command(
        commands,
        "train.train",
        "Train an adapter and compare its score with baselines",
        "train --model bert-base-uncased --train train.csv --eval test.csv --out runs/classifier",
        "The scores before and after training stand beside that of the majority class and,\n"
        "for encoders, that of a logistic regression on their frozen features.",
    )
    parser.add_argument("--model", required=True, type=parse_model, help=MODEL)
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
        "norms-and-biases (default: values in decoders, otherwise norms-and-biases, or all where these have fewer than "
        "d weights)",
    )
    add = parser.add_argument_group("training").add_argument
    add_learning_rate(add, 2e-4)
    add_epochs(add)
    add("--seed", type=int, default=0, help="seed of the projection and of the order of the data")


def _add_info(commands: Any) -> None:
    add = add_command(
        commands,
        "info.info",
        "Print what an adapter is, and whether it fits a base model",
        "info runs/classifier --model bert-base-uncased",
        "The exit status is 0 where it fits and 1 where it does not.",
    ).add_argument
    add("adapter", help=f"folder of the adapter, its name on the Hub, or a {PACKED}")
    model = "base model to compare with (default: the one that the adapter names, if it is on this machine)"
    add("--model", type=parse_model, help=model)
    _add_labels(add)


def _add_distance(commands: Any) -> None:
    add = add_command(
        commands,
        "distance.distance",
        "Compute the distance of a fine-tuned model or an adapter from its base model",
        "distance bert-base-uncased runs/classifier -o runs/distance",
    ).add_argument
    add("base", type=parse_weights, help="base model: a folder, a safetensors file, or a name on the Hub")
    add("tuned", help="fine-tuned model or adapter, in the same form")
    add("--threshold", type=float, default=1e-3, help="change above which an entry counts as changed")
    add("--ignore-missing", action="store_true", help="ignore parameters of one model only, such as a head")
    _add_labels(add)
    add("-o", "--out", metavar="FOLDER", help="folder for distance.json, distance.md and distance.png")


def _add_pack(commands: Any) -> None:
    parser = add_command(
        commands,
        "pack.pack",
        "Pack an adapter into a file of about a hundred bytes",
        "pack runs/classifier -o classifier.pia --levels 8 --eval test.csv",
        "θ is quantized to a few values and entropy-coded.",
    )
    add = parser.add_argument
    add("adapter", help="folder of the adapter, or its name on the Hub")
    add("-o", "--out", required=True, metavar="FILE", help="packed adapter to write (x.pia)")
    limit = parser.add_mutually_exclusive_group().add_argument
    limit("--levels", type=int, help="number of values that θ is quantized to (default: 8)")
    limit("--max-bytes", type=int, help="instead, the size that the file may have")
    limit("--max-error", type=float, help="instead, the rounding error allowed, relative to the norm of θ")
    add("--model", type=parse_model, help=FOUND)
    _add_labels(add)
    add("--text-form", action="store_true", help="print the packed adapter as URL-safe text too")
    add("--qr", metavar="FILE", help="QR code to draw, as PNG or SVG")
    add("--eval", metavar="FILE", help=f"held-out data to report the accuracy on: a {FILE}")
    add_texts(add, "training data for --finetune, in the same form", required=False)
    _add_finetuning(add, "; needs --levels and --train")
    add = add_command(
        commands,
        "pack.unpack",
        "Unpack a packed adapter into a folder that PEFT loads",
        "unpack classifier.pia -o runs/again",
    ).add_argument
    add("file", help=PACKED)
    add("-o", "--out", required=True, metavar="FOLDER", help="folder to write, new or empty")
    add("--model", type=parse_model, help=FOUND)


def _add_certify(commands: Any) -> None:
    add = add_command(
        commands,
        "certify.certify",
        "Bound the error of an adapter on new examples",
        "certify --adapter runs/classifier --train train.csv",
        "The bound needs no held-out data: it counts the errors on the training examples\n"
        "and the bits of the packed adapter. For a language model, it bounds the bits per\n"
        "token of new documents.",
    ).add_argument
    add("--adapter", help=f"folder or {PACKED} that was trained on the training data")
    several = "instead, values of d: adapters to train and select from"
    add("--dims", type=parse_integers, metavar="D[,D]", help=several)
    add("--levels", type=parse_integers, default="8", metavar="N[,N]", help="numbers of values to quantize θ to")
    add(
        "--num-tried",
        type=int,
        default=1,
        metavar="N",
        help="combinations of d, seed, learning rate and steps that were tried on these data; the command multiplies "
        "them by its own",
    )
    add("--delta", type=float, default=0.05, help="probability that the bound fails")
    add_texts(add)
    add("--eval", metavar="FILE", help="data that were used for no choice, to compare the bound with")
    kind = "what the model predicts: a label per text, or the next token (default: as the adapter; SEQ_CLS with --dims)"
    add("--task-type", choices=["SEQ_CLS", "CAUSAL_LM"], help=kind)
    language = "for a language model, "
    alphas = f"{language}weights of the uniform distribution to choose from (default: those of Lotfi et al. 2023)"
    add("--alpha", type=_parse_floats, metavar="A[,A]", help=alphas)
    documents = f"{language}training documents to compute the loss on (default: all, or 10000 of more)"
    add("--sample", type=int, metavar="DOCUMENTS", help=documents)
    add("--model", type=parse_model, help=f"{FOUND}; required with --dims")
    out = "packed adapter to write, or with --dims the folder of the sweep (default: beside the adapter)"
    add("-o", "--out", help=out)
    add("--steps", type=int, default=1000, help="training steps, with --dims")
    _add_finetuning(add)
    add("--seed", type=int, default=0, help="seed of the training, with --dims")
    add = add_command(
        commands,
        "certify.verify",
        "Verify a certificate against its packed adapter and the training data",
        "verify runs/classifier/adapter.pia --train train.csv",
        "All figures of the certificate are computed again.",
    ).add_argument
    add("file", help=f"{PACKED} with its certificate beside it")
    add_texts(add, length=False)
    add("--model", type=parse_model, help=FOUND)


def _add_labels(add: Any) -> None:
    """Add the option for the number of labels."""
    labels = "number of labels of the base model's head, for adapters that do not store it"
    add("--num-labels", "--labels", dest="labels", type=int, help=labels)


def _add_finetuning(add: Any, more: str = "") -> None:
    """Add the options for quantization-aware training."""
    add("--finetune", type=int, default=0, metavar="STEPS", help=f"steps of quantization-aware training{more}")
    add_learning_rate(add, 2e-4, "; --finetune uses a tenth of it")


def _parse_floats(text: str) -> list[float]:
    """Parse decimal numbers with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not decimal numbers with commas between them.") from None
