"""The command itself: its help, its errors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from peft_intrinsic_cli import main


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


@pytest.mark.parametrize(
    ("error", "short"), [(KeyboardInterrupt(), True), (FileNotFoundError("x.csv"), True), (ValueError("a bug"), False)]
)
def test_bugs_keep_their_traceback(error, short, monkeypatch, capsys):
    """What is raised on purpose is a line; the rest, and all with --debug, is a traceback."""

    def run(args):
        raise error

    monkeypatch.setattr("peft_intrinsic_cli._analyze", run)
    with pytest.raises(SystemExit if short else ValueError) as ended:
        main(["analyze", "run"])
    if short:
        assert ended.value.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
        assert "peft-intrinsic: " in capsys.readouterr().err


def test_debug_shows_what_else_is_a_line(tmp_path, capsys):
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
def test_options_with_several_values_leave_what_follows_to_the_command(words, columns, left, monkeypatch):
    found: list = []
    monkeypatch.setattr("peft_intrinsic_cli.others.import_module", lambda name: Recorder(found))
    monkeypatch.setattr("peft_intrinsic_cli._study", found.append)
    main(words)
    (args,) = found
    assert args.text == columns
    assert {name: getattr(args, name) for name in left} == left


class Recorder:
    """A package whose commands do nothing but note their arguments."""

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
def test_unknown_arguments_are_named_with_the_form_of_several_values(words, unknown, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert f"unrecognized arguments: {unknown}. An option takes one value; several" in capsys.readouterr().err
