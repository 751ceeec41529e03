"""The section of a model card on how to load an adapter of this package."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from .version import REPOSITORY, pip_install

HEADING = "## How to get started with this adapter"

EXTRAS = {"INTRINSIC": "", "SUPERMASK": "[codec]"}
"""The methods of this package, and the extras that each needs to load an adapter."""

MODEL_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
"""Model classes of transformers by the `TaskType` of an adapter."""

_TOP = re.compile(r"(?:---\n.*?^---\n)?.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
"""The text above the section: metadata, the title and everything up to the first heading."""

_WRITERS: tuple[tuple[str, str, str, Callable[..., Any]], ...] = (
    ("transformers.trainer", "Trainer", "create_model_card", lambda trainer: trainer.args.output_dir),
    ("trl.trainer.base_trainer", "_BaseTrainer", "create_model_card", lambda trainer: trainer.args.output_dir),
    (
        "sentence_transformers.base.model",
        "BaseModel",
        "_create_model_card",
        lambda model: model.model_card_data.save_dir,
    ),
)
"""Functions that replace the card: module, class and name, and how to get the folder of the card."""


def _section(config: Mapping[str, Any]) -> str:
    method, name = config["peft_type"], config.get("base_model_name_or_path")
    loader, labels = MODEL_CLASSES.get(config.get("task_type") or ""), config.get("num_labels")
    imports, code = "", f"base_model = ...  # load {name or 'the model'} as for the training of this adapter"
    if name and loader:
        more = f", num_labels={labels}" if labels else ""
        imports = f"from transformers import {loader}\n"
        code = f"base_model = {loader}.from_pretrained({name!r}{more})"
    return f"""
{HEADING}

This adapter needs the package [peft_intrinsic]({REPOSITORY}) beside PEFT:

```bash
{pip_install(EXTRAS[method])}
```

It then loads like any other adapter:

```python
from peft import PeftModel
{imports}
{code}
model = PeftModel.from_pretrained(base_model, "path or name of this adapter")
```

`KeyError: '{method}'` means that the package is not installed, or that its registration is switched off. In the second
case, `import peft_intrinsic` before loading.
"""


def add_section(folder: Path) -> None:
    """Add the section to the card in a folder, if there is a card and an adapter of this package beside or below it."""
    card = folder / "README.md"
    if not card.is_file() or HEADING in (text := card.read_text(encoding="utf-8")):
        return
    for path in (folder / CONFIG_NAME, *sorted(folder.glob(f"*/{CONFIG_NAME}"))):
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if config.get("peft_type") in EXTRAS:
            top = _TOP.match(text).end()  # type: ignore[union-attr]
            card.write_text(f"{text[:top].rstrip()}\n{_section(config)}\n{text[top:]}", encoding="utf-8")
            return


def add_sections(folder: Path) -> None:
    """Add the section where an adapter has just been saved.

    PEFT writes one card for all adapters of a model, above the folders of those that are not called `default`. Trainers
    and sentence-transformers write theirs after the adapter, so their methods are extended first.
    """
    for writer in _WRITERS:
        _extend(*writer)
    add_section(folder)
    above = folder.parent / "README.md"
    text = above.read_text(encoding="utf-8", errors="replace") if above.is_file() else ""  # of any project
    if re.match(r"---\n.*?^library_name: peft$.*?^---$", text, re.MULTILINE | re.DOTALL):
        add_section(folder.parent)


def _extend(module: str, name: str, method: str, folder: Callable[[Any], str]) -> None:
    owner = getattr(sys.modules.get(module), name, None)
    original = getattr(owner, method, None)
    if original is None or getattr(original, "adds_section", False):
        return

    @functools.wraps(original)
    def write_card(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        add_section(Path(folder(self)))
        return result

    write_card.adds_section = True  # type: ignore[attr-defined]
    setattr(owner, method, write_card)
