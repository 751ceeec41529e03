"""The section of model cards on how to load an adapter."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import adapter_calls, build, trained
from huggingface_hub import ModelCard, ModelCardData
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_intrinsic import IntrinsicConfig, SupermaskConfig
from peft_intrinsic.card import EXTRAS, HEADING
from peft_intrinsic.version import REPOSITORY
from peft_intrinsic_autoload import METHODS


def headings(folder: Path) -> list[str]:
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("## ")]


def test_section_is_the_first_of_the_card_and_points_to_the_repository(tmp_path):
    model = trained("bert")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert headings(tmp_path)[0] == HEADING
    assert headings(tmp_path).count(HEADING) == 1
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f'pip install -U "peft_intrinsic @ git+{REPOSITORY}"' in card
    assert "pip install peft_intrinsic" not in card  # the name is free on the package index


def test_section_loads_the_base_model_as_the_adapter_needs_it(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# Title\n")
    config = IntrinsicConfig(task_type="SEQ_CLS", base_model_name_or_path="some/base")
    config.num_labels = 3
    config.save_pretrained(tmp_path)
    text = card.read_text(encoding="utf-8")
    assert "PeftModel\nfrom transformers import AutoModelForSequenceClassification\n\nbase_model = " in text
    assert "AutoModelForSequenceClassification.from_pretrained('some/base', num_labels=3)\nmodel = " in text
    card.write_text("# Title\n")
    IntrinsicConfig().save_pretrained(tmp_path)
    assert "PeftModel\n\nbase_model = ...  # load the model as" in card.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # of this base model, by PEFT
def test_a_saved_card_is_short_and_describes_the_adapter(tmp_path):
    for d in (50, 60):  # the second one replaces the first
        base = build("bert")
        base.config._name_or_path = base.name_or_path = "some/base"
        get_peft_model(base, IntrinsicConfig(d=d)).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"peft", "intrinsic", "base_model:adapter:some/base"} <= set(card.data.tags)
    assert (card.data.library_name, card.data.base_model) == ("peft", "some/base")
    assert card.text.strip().startswith("# Adapter for some/base\n")
    assert "- Trainable parameters: 60\n" in card.text
    assert "Trainable parameters: 50" not in card.text
    assert "nformation needed" not in card.text.lower()
    assert "- Base model: some/base\n" in card.text
    assert re.search(r"^- Manifest: [0-9a-f]{16}$", card.text, re.MULTILINE)
    assert len(card.text.splitlines()) < 50
    assert "- PEFT " in card.text


def test_sections_that_the_user_filled_in_are_preserved_below_their_heading(tmp_path):
    get_peft_model(build("bert"), IntrinsicConfig()).save_pretrained(tmp_path)
    template = ModelCard.from_template(ModelCardData(library_name="peft"))
    template.text = template.text.replace("### Results\n\n[More Information Needed]", "### Results\n\nAccuracy 0.9.")
    template.save(tmp_path / "README.md")
    IntrinsicConfig().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "## Evaluation\n\n" in card
    assert "### Results\n\nAccuracy 0.9.\n" in card
    assert "Carbon" not in card


def test_every_method_that_autoload_registers_has_a_section():
    assert set(EXTRAS) == set(METHODS)


def test_section_names_what_a_supermask_needs(tmp_path):
    get_peft_model(build("bert"), SupermaskConfig()).save_pretrained(tmp_path)
    assert headings(tmp_path)[0] == HEADING
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"peft_intrinsic[codec] @ git+{REPOSITORY}" in card
    assert "KeyError: 'SUPERMASK'" in card


def test_adapters_of_any_name_have_the_section_in_the_card_of_the_model(tmp_path):
    get_peft_model(build("bert"), IntrinsicConfig(), adapter_name="mine").save_pretrained(tmp_path)
    assert headings(tmp_path)[0] == HEADING


def test_metadata_and_text_of_a_card_are_preserved(tmp_path):
    top = "---\ntags:\n- '## no heading'\n---\n\n# Title\n\nA sentence.\n"
    (tmp_path / "README.md").write_text(f"{top}\n## Data\n\nFilms.\n", encoding="utf-8")
    IntrinsicConfig().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"{top}\n{HEADING}\n")
    assert card.endswith("\n\n## Data\n\nFilms.\n")


def test_cards_of_other_folders_are_left_alone(tmp_path):
    (tmp_path / "README.md").write_bytes("# A project in Köln\n".encode("latin-1"))
    (tmp_path / "adapters").mkdir()
    IntrinsicConfig().save_pretrained(tmp_path / "adapters/first")
    IntrinsicConfig().save_pretrained(tmp_path / "second")
    assert (tmp_path / "README.md").read_bytes() == "# A project in Köln\n".encode("latin-1")
    assert not (tmp_path / "adapters/first/README.md").exists()


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=adapter_calls)])
def test_cards_that_trainer_writes_have_the_section(native, tmp_path):
    model = trained("bert", task_type="SEQ_CLS")
    if native:
        model.save_pretrained(tmp_path / "adapter")
        model = build("bert")
        model.load_adapter(str(tmp_path / "adapter"))
    arguments = TrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True)
    trainer = Trainer(model=model, args=arguments)
    trainer.save_model()
    trainer.create_model_card(model_name="classifier")
    assert headings(tmp_path / "out")[0] == HEADING
    assert "# classifier" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_cards_that_sentence_transformers_writes_have_the_section(tmp_path, monkeypatch):
    """A stub with its order of calls; `tests/programs.py` runs the library itself."""

    class BaseModel:
        model_card_data = SimpleNamespace(save_dir=None)

        def save(self, path):
            IntrinsicConfig().save_pretrained(path)
            self._create_model_card(path)

        def _create_model_card(self, path, model_name=None):
            self.model_card_data.save_dir = path
            Path(path, "README.md").write_text("# Sentence Transformer model\n\n## Model Details\n")

    library = ModuleType("sentence_transformers.base.model")
    library.BaseModel = BaseModel
    monkeypatch.setitem(sys.modules, library.__name__, library)
    for _ in range(2):
        BaseModel().save(str(tmp_path))
        assert headings(tmp_path) == [HEADING, "## Model Details"]
