"""The command `peft-intrinsic`: parsers and messages. Torch and the package are imported when a subcommand runs."""

from __future__ import annotations

import argparse
import dis
import io
import os
import sys
import warnings
from importlib import import_module
from importlib.metadata import version
from typing import Any

from . import adapters, measure, serve, trajectory
from .parsing import HelpFormatter

INTERRUPTED = "interrupted. What a run with a folder of trials or snapshots has finished is stored, and is reused."


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="peft-intrinsic",
        description="Train, measure, inspect, pack, certify and serve intrinsic-dimension adapters.",
        epilog="example:\n  peft-intrinsic train --help",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("peft_intrinsic"), help="print the version")
    parser.add_argument("--debug", action="store_true", help="print the whole traceback of every error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for module in (adapters, measure, trajectory, serve):
        module.add_parsers(commands)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: words after `peft-intrinsic`; `None` takes those of the process.

    Raises:
        SystemExit: the status is 2 after invalid input, which prints one line, and 130 after Ctrl-C.
    """
    parser = build_parser()
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        hint = "An option takes one value; join several with commas: --text sentence1,sentence2."
        parser.error(f"unrecognized arguments: {' '.join(unknown)}. {hint}")
    for stream in (sys.stdout, sys.stderr):  # ≤ is not in every code page
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        _run(args)
    except KeyboardInterrupt:
        parser.exit(130, f"\npeft-intrinsic: {INTERRUPTED}\n")
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if args.debug or not _is_message(error):
            raise
        parser.exit(2, f"peft-intrinsic: {error}\n")


def _run(args: argparse.Namespace) -> None:
    """Call the function that `args.run` names, as `module.function` of `peft_intrinsic.commands`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # each new head is reported as missing
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT uses it
    module, _, function = args.run.partition(".")
    try:
        commands = import_module(f"peft_intrinsic.commands.{module}")
    except ImportError as error:
        from peft_intrinsic.version import pip_install

        raise RuntimeError(f"{error}. {pip_install('[codec,measure]')}") from None
    getattr(commands, function)(args)


def _is_message(error: BaseException) -> bool:
    """Whether an error is a message for the user: of a file or an import, or by a `raise` statement of this package.

    All others are internal: those of other packages, and those that built-in functions cause in this one.
    """
    if isinstance(error, (OSError, ImportError)):
        return True
    place: Any = error.__traceback__
    while place.tb_next:
        place = place.tb_next
    frame = place.tb_frame
    raised = frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and frame.f_globals.get("__name__", "").startswith("peft_intrinsic")
