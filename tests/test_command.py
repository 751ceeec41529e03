"""The command itself: its help, its errors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from peft_intrinsic_command import main


def test_help_needs_no_torch():
    code = """
import sys
from peft_intrinsic_command import main
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

    monkeypatch.setattr("peft_intrinsic_command._analyse", run)
    with pytest.raises(SystemExit if short else ValueError) as ended:
        main(["analyse", "run"])
    if short:
        assert ended.value.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
        assert "peft-intrinsic: " in capsys.readouterr().err


def test_debug_shows_what_else_is_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["analyse", str(tmp_path)])
    assert "is not the folder of a run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not the folder of a run"):
        main(["--debug", "analyse", str(tmp_path)])
