"""Trials on text, each in one `accelerate launch` (or torchrun, or python)."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..trials.store import write_whole
from .options import TextOptions


class LaunchedFit:
    """`fit(d, seed, learning_rate)` that runs a trial through a launcher, which must understand `-m MODULE`.

    Args:
        options: See `TextFit`.
        launcher: Command such as `"accelerate launch --num_processes 2 --main_process_port 0"`. Port 0 is any free
            one, so that trials can run side by side.
        folder: Folder for tokenized data and logs.

    Raises:
        RuntimeError: The launched process failed; the message ends with the end of its standard error.
    """

    def __init__(self, options: TextOptions, launcher: str, folder: str | os.PathLike) -> None:
        # A cluster may run a trial in another folder.
        files: dict[str, Any] = {name: str(Path(getattr(options, name)).resolve()) for name in options.local_files}
        self.options, self.launcher, self.folder = replace(options, **files), launcher, str(Path(folder).resolve())

    def __call__(self, d: int | None, seed: int, learning_rate: float | None = None) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "result.json")
            trial: dict[str, Any] = {"options": asdict(self.options), "folder": self.folder, "out": str(out)}
            trial |= {"trial": [d, seed, learning_rate], "parent": os.getpid()}
            command = [*shlex.split(self.launcher), "-m", "peft_intrinsic.text.launch", json.dumps(trial)]
            # The launcher of this environment, even if the environment is not activated.
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
            ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
            if ended.returncode or not out.exists():
                raise RuntimeError(f"{self.launcher} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
            return json.loads(out.read_text())


def _end_with(run: int) -> None:
    """End this process when the run that needs its result, or its launcher, has ended."""
    launcher = os.getppid()
    while os.getppid() == launcher and _is_running(run):
        time.sleep(1)
    os._exit(1)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _main(trial: Mapping[str, Any]) -> None:
    threading.Thread(target=_end_with, args=(trial["parent"],), daemon=True).start()
    from .training import TextFit

    options = {**trial["options"], "columns": tuple(trial["options"]["columns"])}
    fit = TextFit(TextOptions(**options), folder=trial["folder"])
    out = Path(trial["out"])
    fit.training.arguments["output_dir"] = str(out.parent)  # shared: all processes load the best checkpoint from it
    result = fit(*trial["trial"])
    if os.environ.get("RANK", "0") == "0":
        write_whole(out, json.dumps(result))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
