"""The command itself: its help and its errors."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest
import torch
from test_documents import PAGES

from peft_intrinsic import __version__
from peft_intrinsic.text import methods
from peft_intrinsic_cli import build_parser, main
from peft_intrinsic_cli.measure import METHODS


def subcommands(parser: argparse.ArgumentParser, *words: str) -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """All parsers below one, actions of subcommands included."""
    found: dict[tuple[str, ...], argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                found |= {(*words, name): below, **subcommands(below, *words, name)}
    return found


COMMANDS = subcommands(build_parser())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_begins_with_a_sentence_and_ends_with_an_example_that_parses(words, monkeypatch):
    shown = COMMANDS[words].format_help()
    description = COMMANDS[words].description.splitlines()[0]
    assert re.fullmatch(r"[A-Z][^.]+\.", description), description
    assert description in shown
    _, _, example = shown.partition("\nexample:\n  peft-intrinsic ")
    assert example
    calls: list[argparse.Namespace] = []
    monkeypatch.setattr("peft_intrinsic_cli._run", calls.append)
    main(shlex.split(example.replace("\\\n", " ")))
    module, function = calls[0].run.split(".")
    assert callable(getattr(import_module(f"peft_intrinsic.commands.{module}"), function))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_option_has_a_help_with_its_default(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    parser = COMMANDS[words]
    shown = " ".join(parser.format_help().split())
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        text = parser._get_formatter()._expand_help(action)
        assert text, action
        assert text in shown, action
        if action.option_strings and not action.required and action.nargs != 0:
            required = words[0] in ("train", "measure", "advise", "study") and action.dest in ("train", "eval")
            assert re.search(r" \(required without --task\)$" if required else r" \(default: .+\)$", text), text
        if action.dest in ("train", "eval", "out") and action.option_strings:
            assert action.metavar in ("FILE", "FOLDER") or words == ("certify",), action
        if action.choices:
            assert f"{{{','.join(action.choices)}}}" in shown, action


def test_former_names_of_options_are_read_as_before(monkeypatch):
    calls: list[argparse.Namespace] = []
    monkeypatch.setattr("peft_intrinsic_cli._run", calls.append)
    for batch, rate, labels in (("batch", "lr", "labels"), ("batch-size", "learning-rate", "num-labels")):
        main(f"pack adapter -o x.pia --{batch} 8 --{rate} 1e-3 --{labels} 3".split())
    assert calls[0] == calls[1]
    assert (calls[0].batch, calls[0].lr, calls[0].labels) == (8, 1e-3, 3)


TAKES_BASE = [
    words for words in COMMANDS if {action.dest for action in COMMANDS[words]._actions} & {"model", "models", "base"}
]


NO_BASE = [
    ("adapter", "adapter is the folder of an adapter. Pass its base model, some/base."),
    ("c2.pia", "c2.pia is a packed adapter. Pass its base model; info prints its name."),
    ("./nowhere", "there is no folder ./nowhere. Pass an existing one, or a name on the Hub."),
    ("runs", "runs has no config.json, so it is not the folder of a model. Pass the folder of a saved model, or"),
]


@pytest.mark.parametrize(
    ("words", "name", "message"),
    [
        pytest.param(words, name, message, id=f"{' '.join(words)} {name}")
        for words in TAKES_BASE
        for name, message in NO_BASE
        if (words, name) != (("distance",), "runs")  # distance reads weights alone
    ],
)
def test_base_models_that_cannot_be_loaded_are_reported(words, name, message, tmp_path, monkeypatch, capsys):
    """transformers would load the folder of an adapter with its own base model, or print a traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    (tmp_path / "runs").mkdir()
    (tmp_path / "c2.pia").touch()
    monkeypatch.setattr("peft_intrinsic_cli._run", lambda args: None)
    _, _, example = COMMANDS[words].format_help().partition("\nexample:\n  peft-intrinsic ")
    given = [name if word == "bert-base-uncased" else word for word in shlex.split(example.replace("\\\n", " "))]
    with pytest.raises(SystemExit, match="2"):
        main(given if name in given else [*given, "--model", name])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_help_lists_each_subcommand_with_a_verb_phrase():
    shown = build_parser().format_help()
    for words in COMMANDS:
        if len(words) == 1:
            assert re.search(rf"^    {words[0]}\s+[A-Z][a-z-]+ ", shown, re.MULTILINE), words


def test_methods_in_the_help_are_those_of_the_package():
    assert tuple(methods.METHODS) == METHODS


def test_help_needs_no_torch():
    code = """
import sys
from peft_intrinsic_cli import main
for words in (["--help"], ["measure", "--help"], ["trajectory", "fit", "--help"]):
    try:
        main(words)
    except SystemExit as ended:
        assert ended.code == 0
print({"torch", "numpy", "peft", "peft_intrinsic"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_documentation_parse(page, monkeypatch):
    calls: list[argparse.Namespace] = []
    monkeypatch.setattr("peft_intrinsic_cli._run", calls.append)
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^ *(?:python -m peft_intrinsic|peft-intrinsic) (.+)", text, re.MULTILINE)
    commands = [words for words in found if "…" not in words]
    for words in commands:
        main(shlex.split(re.sub(r"\S+\*", "expanded", words), comments=True))
    assert len(calls) == len(commands) >= (page.name == "command_line.md")


def test_python_m_runs_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["-m", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("peft_intrinsic", run_name="__main__")
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (FileNotFoundError("x.csv"), 2), (ModuleNotFoundError("x"), 2)]
)
def test_interrupts_missing_files_and_missing_packages_print_one_line(error, status, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setattr("peft_intrinsic.commands.measure.analyze", run)
    with pytest.raises(SystemExit) as ended:
        main(["analyze", "run"])
    assert ended.value.code == status
    assert capsys.readouterr().err.strip().startswith("peft-intrinsic: ")


def raise_value_error(folder):
    raise ValueError("a bug")


INSTALLED: dict[str, Any] = {"__name__": "another.module"}
"""A module of another package, whose environment is in a clone of this repository."""
exec(
    compile("def fail(folder): raise ValueError('a bug')", "peft_intrinsic/.venv/another/module.py", "exec"), INSTALLED
)


@pytest.mark.parametrize(
    "bug",
    [
        pytest.param(raise_value_error, id="raised by another package"),
        pytest.param(INSTALLED["fail"], id="raised by a package in a folder called peft_intrinsic"),
        pytest.param(int, id="caused by a built-in function in this package"),
        pytest.param(torch.device, id="raised by compiled code"),
    ],
)
def test_internal_errors_print_a_traceback(bug, monkeypatch):
    """Invalid input alone, for which this package raises an error, prints one line."""
    monkeypatch.setattr("peft_intrinsic.commands.measure.analyze_trials", bug)
    with pytest.raises((ValueError, RuntimeError), match=r"a bug|invalid literal|device"):
        main(["analyze", "run"])


def test_debug_prints_a_traceback_instead_of_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["analyze", str(tmp_path)])
    assert "is not the folder of a run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not the folder of a run"):
        main(["--debug", "analyze", str(tmp_path)])


TRANSFER = ["trajectory", "transfer", "--model", "m", "--train", "t.csv", "--eval", "e.csv", "-o", "out"]


@pytest.mark.parametrize(
    ("words", "columns", "left"),
    [
        (["pack", "--text", "a,b", "adapter", "-o", "x.pia"], ["a", "b"], {"adapter": "adapter"}),
        (["verify", "--train", "t.csv", "--text", "a", "x.pia"], ["a"], {"file": "x.pia"}),
        (["study", "models", "--out", "out", "--text", "a,b", "one", "two"], ["a", "b"], {"models": ["one", "two"]}),
        (
            ["trajectory", "outliers", "--model", "m", "--train", "t.csv", "-o", "out", "--text", "a", "adapter"],
            ["a"],
            {"adapter": "adapter"},
        ),
        (
            [*TRANSFER, "--text", "a", "--modules-to-save", "head,body", "one", "two"],
            ["a"],
            {"recordings": ["one", "two"], "modules_to_save": ["head", "body"]},
        ),
    ],
)
def test_options_with_several_values_do_not_consume_positional_arguments(words, columns, left, monkeypatch):
    found: list = []
    monkeypatch.setattr("peft_intrinsic_cli.import_module", lambda name: Recorder(found))
    main(words)
    (args,) = found
    assert args.text == columns
    assert {name: getattr(args, name) for name in left} == left


class Recorder:
    """A module whose functions record their arguments."""

    def __init__(self, found: list) -> None:
        self.found = found

    def __getattr__(self, name):
        return self.found.append


@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        ("certify --train t.csv --adapter a --test e.csv", "--test e.csv"),
        ("measure --model m --out out --text a b", "b"),
    ],
)
def test_unknown_arguments_are_reported_with_a_hint_on_several_values(words, unknown, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert f"unrecognized arguments: {unknown}. An option takes one value; join several" in capsys.readouterr().err
