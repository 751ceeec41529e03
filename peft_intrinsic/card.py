"""The section of a model card on how to load an adapter of this package."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import CONFIG_NAME

from .version import REPOSITORY, pip_install

HEADING = "## How to get started with this adapter"

CLAIM = "Certified: "
"""How the line of a card begins that `peft-intrinsic certify` writes."""

ADAPTER, BANK = "adapter", "adapter bank"
"""What a card calls the folder."""

BANK_FILE = "adapter_bank.safetensors"
"""The name of the file with the rows of an adapter bank, and their names."""

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

_OWN = re.compile(rf"^{HEADING}(?: bank)?$.*?(?=^#{{2,3}} |\Z)", re.DOTALL | re.MULTILINE)
"""The section itself, which is written again at every save: d and targets may be others."""

_CLAIM = re.compile(rf"^{CLAIM}.*\n?", re.MULTILINE)
"""The claim of a certificate, which is not of the adapter that is saved now."""

_TEMPLATE_TITLE = "# Model Card for Model ID"
_TRAINER_HEADINGS = ("## Model description", "## Intended uses & limitations", "## Training and evaluation data")
_PLACEHOLDER = re.compile(r"More information needed|This is the model card of a 🤗 transformers model.*")

_OF_PEFT = re.compile(r"---\n(?:(?!^---$).)*^library_name: peft$", re.MULTILINE | re.DOTALL)

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


def _section(config: Mapping[str, Any], what: str) -> str:
    method, name = config["peft_type"], config.get("base_model_name_or_path")
    loader, labels = MODEL_CLASSES.get(config.get("task_type") or ""), config.get("num_labels")
    imports, code = "", f"base_model = ...  # load {name or 'the model'} as for the training of this {what}"
    if name and loader:
        more = f", num_labels={labels}" if labels else ""
        imports = f"from transformers import {loader}\n"
        code = f"base_model = {loader}.from_pretrained({name!r}{more})"
    package, kind, result, note = "peft", "PeftModel", "model", _NO_KEY.format(method)
    if what == BANK:
        package, kind, result, note = "peft_intrinsic", "AdapterBank", "bank", ""
    return f"""
{HEADING.replace(ADAPTER, what)}

This {what} needs the package [peft_intrinsic]({REPOSITORY}) beside PEFT:

```bash
{pip_install(EXTRAS[method])}
```

It then loads {"on the base model" if what == BANK else "like any other adapter"}:

```python
from {package} import {kind}
{imports}
{code}
{result} = {kind}.from_pretrained(base_model, "path or name of this {what}")
```

{note}{_describe(config)}
"""


_NO_KEY = """\
`KeyError: '{}'` means that the package is not installed, or that its registration is switched off. In the second
case, `import peft_intrinsic` before loading.

"""


def _describe(config: Mapping[str, Any]) -> str:
    """A list of what the adapter is, from its configuration."""
    facts = {
        "Method": "mask of the base weights" if config["peft_type"] == "SUPERMASK" else config.get("projection"),
        "Trainable parameters": config.get("d"),
        "Base model": config.get("base_model_name_or_path"),
        "Targets": config.get("target_modules"),
        "Manifest": (config.get("manifest") or "")[:16],
        "Digest of the base weights": config.get("base_digest"),
    }
    return "\n".join(
        f"- {name}: {', '.join(value) if isinstance(value, list) else value}" for name, value in facts.items() if value
    )


@functools.cache
def _template() -> frozenset[str]:
    """Lines of the template that PEFT and transformers begin a card with."""
    return frozenset(ModelCard.from_template(ModelCardData()).text.splitlines())


def _is_empty(lines: list[str]) -> bool:
    """Whether the lines are all of a template."""
    return all(line in _template() or _PLACEHOLDER.fullmatch(line) for line in lines if line.strip())


def _remove_placeholders(text: str) -> str:
    """Remove the sections of a template that are not filled in. A heading stays above a section that is."""
    if "more information needed" not in text.lower():
        return text
    sections: list[str] = []
    below = 0
    for section in reversed(re.split(r"^(?=#{2,6} )", text, flags=re.MULTILINE)):
        heading, *lines = section.splitlines() or [""]
        known = heading in _template()
        level = len(heading) - len(heading.lstrip("#"))
        if level < below or not ((known or heading in _TRAINER_HEADINGS) and _is_empty(lines)):
            sections.append(section)
            below = level if known else 0
    return "".join(reversed(sections))


def _tag(metadata: Any, config: Mapping[str, Any], what: str) -> None:
    """Set what the Hub filters by, and leave out a base model without a name. A store of adapters lists no bank."""
    name = config.get("base_model_name_or_path")
    tags = {tag for tag in metadata.tags or [] if tag != "base_model:adapter:"}
    kind = "adapter-bank" if what == BANK else config["peft_type"].lower()
    tags |= {"peft", kind} | ({f"base_model:adapter:{name}"} if name else set())
    metadata.tags = sorted(tags)
    metadata.base_model = metadata.base_model or name or None


def _find_config(folder: Path) -> Mapping[str, Any] | None:
    """The configuration of the first adapter of this package in a folder or below it."""
    for path in (folder / CONFIG_NAME, *sorted(folder.glob(f"*/{CONFIG_NAME}"))):
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if config.get("peft_type") in EXTRAS:
            return config
    return None


def add_section(folder: Path) -> None:
    """Write the section into the card of a folder, if an adapter of this package is beside or below it."""
    path = folder / "README.md"
    if not path.is_file() or (config := _find_config(folder)) is None:
        return
    what = BANK if (folder / BANK_FILE).is_file() else ADAPTER
    text = _CLAIM.sub("", _OWN.sub("", path.read_text(encoding="utf-8")))
    top = _TOP.match(text).end()  # type: ignore[union-attr]
    metadata, title, summary = text[:top].rstrip().partition(_TEMPLATE_TITLE)
    if title and _is_empty(summary.splitlines()):
        name = config.get("base_model_name_or_path") or "a base model"
        title, summary = f"# {what.capitalize()} for {name}", f"\n\nIt was trained with [peft_intrinsic]({REPOSITORY})."
    text = f"{metadata}{title}{summary}\n{_section(config, what)}\n{_remove_placeholders(text[top:])}"
    if _OF_PEFT.match(text):
        card = ModelCard(text, ignore_metadata_errors=True)
        _tag(card.data, config, what)
        text = str(card)
    path.write_text(text, encoding="utf-8")


def add_sections(folder: Path) -> None:
    """Add the section where an adapter has just been saved.

    PEFT writes one card for all adapters of a model, above the folders of those that are not called `default`. Trainers
    and sentence-transformers write theirs after the adapter, and transformers replaces the card before it uploads a
    folder, so their methods are extended first.
    """
    for writer in _WRITERS:
        _extend(*writer)
    _wrap("transformers.utils.hub", "PushToHubMixin", "_upload_modified_files", _complete_upload)
    add_section(folder)
    above = folder.parent / "README.md"
    text = above.read_text(encoding="utf-8", errors="replace") if above.is_file() else ""  # of any project
    if _OF_PEFT.match(text):
        add_section(folder.parent)


def _extend(module: str, name: str, method: str, folder: Callable[[Any], str]) -> None:
    def write(original: Callable[[], Any], writer: Any, *args: Any, **kwargs: Any) -> Any:
        result = original()
        add_section(Path(folder(writer)))
        return result

    _wrap(module, name, method, write)


def _complete_upload(upload: Callable[[], Any], model: Any, working_dir: str, *args: Any, **kwargs: Any) -> Any:
    """Upload a folder whose card transformers has replaced by a template."""
    if _find_config(Path(working_dir)) is not None:
        if hasattr(model, "create_or_update_model_card"):
            model.create_or_update_model_card(working_dir)
        add_section(Path(working_dir))
    return upload()


def _wrap(module: str, name: str, method: str, wrapper: Callable[..., Any]) -> None:
    owner = getattr(sys.modules.get(module), name, None)
    original = getattr(owner, method, None)
    if original is None or getattr(original, "adds_section", False):
        return

    @functools.wraps(original)
    def write_card(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(functools.partial(original, self, *args, **kwargs), self, *args, **kwargs)

    write_card.adds_section = True  # type: ignore[attr-defined]
    setattr(owner, method, write_card)
