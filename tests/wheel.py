"""Build the source distribution and the wheel, and run the README with the wheel: `python tests/wheel.py`.

`make test-package` runs it. The wheel is built from the source distribution and installed without its dependencies into
an environment of its own, which finds them where this interpreter does. A tiny random model replaces the README's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
WORDS = ["[PAD]", "[UNK]", "a", "very", "good", "bad", "film"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WHERE = "import peft_intrinsic; print(peft_intrinsic.__file__)"


def run(*command: str | Path, cwd: Path) -> str:
    """Run a program without the clone on its path, and without the Hub. Return its output."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def build(folder: Path) -> Path:
    """Build both distributions into a folder, check them, and return the wheel."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    sdist, wheel = next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=folder)  # the README is rendered
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel into a new environment, and return the folder of its programs."""
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    run(programs / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    site = run(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # after the wheel on sys.path
    assert Path(run(programs / "python", "-c", WHERE, cwd=folder).strip()).is_relative_to(site)
    return programs


def save_model(folder: Path) -> None:
    """Save a tiny encoder without a head, and its tokenizer."""
    BertModel(BertConfig(vocab_size=len(WORDS), **SIZES)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


def main() -> None:
    """Run the steps, and fail at the first that fails."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        programs = install(wheel, folder / "environment")
        save_model(folder / "base")
        (folder / "readme.py").write_text(block.replace("bert-base-uncased", "base"), encoding="utf-8")
        assert "trainable params: 200" in run(programs / "python", "readme.py", cwd=folder)
        assert "usage: peft-intrinsic info" in run(programs / "peft-intrinsic", "info", "--help", cwd=folder)
        assert re.search(r"^d +200$", run(programs / "peft-intrinsic", "info", "adapter", cwd=folder), re.MULTILINE)
        print(f"{wheel.name}: built, checked, installed, and the README's first block runs")


if __name__ == "__main__":
    main()
