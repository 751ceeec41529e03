"""What ran: for reports."""

from __future__ import annotations

import platform
import shutil
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

from ..version import __version__


@cache
def versions() -> dict[str, str]:
    """Versions of this package (`git describe` where it runs from a checkout), Python, torch, PEFT, transformers."""
    found = {"peft_intrinsic": __version__, "python": platform.python_version()}
    root = Path(__file__).parents[2]
    if (root / ".git").exists() and shutil.which("git"):
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"], capture_output=True, text=True
        )
        found["git"] = described.stdout.strip()
    return {**found, **{name: version(name) for name in ("torch", "peft", "transformers")}}
