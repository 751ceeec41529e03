"""Programs that never import this package can load its adapters."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from conftest import build
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, get_peft_model
from transformers import AutoModelForSequenceClassification, BertTokenizerFast, PreTrainedModel

import peft_intrinsic_autoload
from peft_intrinsic import IntrinsicConfig, SupermaskConfig
from peft_intrinsic.version import REPOSITORY
from peft_intrinsic_autoload.loading import watch

ROOT = Path(__file__).parents[2]
SWITCHES = ("PEFT_INTRINSIC_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD")

LOADS = """
import multiprocessing, sys
from concurrent.futures import ThreadPoolExecutor

import torch

assert not [name for name in sys.modules if name.partition(".")[0] in ("peft", "transformers", "peft_intrinsic")]

from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, pipeline

base, adapter, mask, out = sys.argv[1:]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(3, 8)[None]).logits


def load():
    return AutoModelForSequenceClassification.from_pretrained(base)


def work(way):
    from peft import PeftModel, PeftType

    assert PeftType("INTRINSIC") == "INTRINSIC"
    logits(PeftModel.from_pretrained(load(), adapter))  # a worker returns only if it can load its adapter
    return way


if __name__ == "__main__":
    before = load()  # its head is missing from the checkpoint, and no adapter has been loaded yet
    from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel

    assert "peft_intrinsic" not in sys.modules
    with ThreadPoolExecutor(8) as pool:
        configs = list(pool.map(lambda _: PeftConfig.from_pretrained(adapter), range(8)))
    assert {type(config).__name__ for config in configs} == {"IntrinsicConfig"}
    found = {"PeftModel": logits(PeftModel.from_pretrained(before, adapter))}
    found["AutoPeftModel"] = logits(AutoPeftModelForSequenceClassification.from_pretrained(adapter))
    found["AutoModel"] = logits(AutoModelForSequenceClassification.from_pretrained(adapter))
    model = load()
    model.load_adapter(adapter)
    found["load_adapter"] = logits(model)
    found["pipeline"] = logits(pipeline("text-classification", adapter, tokenizer=base, device="cpu").model)
    found["supermask"] = logits(PeftModel.from_pretrained(load(), mask))
    assert [multiprocessing.get_context(way).Pool(1).map(work, [way]) for way in ("spawn", "fork")]
    import peft_intrinsic

    assert not getattr(PreTrainedModel.from_pretrained.__func__.__wrapped__, "watched", False)
    torch.save(found, out)
"""

ERROR = """
import torch, peft, sys
print("imported")
try:
    peft.PeftConfig.from_pretrained(sys.argv[1])
except Exception as error:
    print(repr(error))
"""


def run_script(code: str, *arguments: object, **environment: str) -> str:
    """The output of a new process."""
    there = {key: value for key, value in os.environ.items() if key not in SWITCHES}
    there["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.pop("first", ""), there.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "ignore", code, *map(str, arguments)]
    done = subprocess.run(command, env={**there, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def error_script(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("script") / "error.py"
    path.write_text(ERROR)
    return str(path)


@pytest.fixture
def adapter(tmp_path) -> Path:
    """An adapter of a classifier whose head is missing from the base checkpoint."""
    build("bert").bert.save_pretrained(tmp_path / "base")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film"]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "base")
    for name, config in {
        "adapter": IntrinsicConfig(d=50, init_weights=False, task_type="SEQ_CLS"),
        "mask": SupermaskConfig(initial_sparsity=0.3, task_type="SEQ_CLS"),
    }.items():
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        model = get_peft_model(base, config).eval()
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            logits = model(input_ids=torch.arange(3, 8)[None]).logits
        torch.save(logits, tmp_path / f"{name}.pt")
    return tmp_path / "adapter"


@pytest.mark.slow
def test_every_way_of_loading_gives_the_saved_logits_without_an_import(adapter):
    folder = adapter.parent
    (folder / "loads.py").write_text(LOADS)
    run_script(str(folder / "loads.py"), folder / "base", adapter, folder / "mask", folder / "found.pt")
    found = torch.load(folder / "found.pt")
    torch.testing.assert_close(found.pop("supermask"), torch.load(folder / "mask.pt"))
    expected = torch.load(folder / "adapter.pt")
    assert list(found) == ["PeftModel", "AutoPeftModel", "AutoModel", "load_adapter", "pipeline"]
    for logits in found.values():
        torch.testing.assert_close(logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES)
def test_either_variable_switches_autoload_off(switch, adapter, error_script):
    assert run_script(error_script, adapter, **{switch: "0"}) == "imported\nKeyError('INTRINSIC')\n"


@pytest.mark.slow
def test_a_broken_installation_breaks_only_the_load_and_the_error_names_the_cause(adapter, error_script, tmp_path):
    (tmp_path / "broken/peft_intrinsic").mkdir(parents=True)
    (tmp_path / "broken/peft_intrinsic/__init__.py").write_text("raise OSError('a library of scipy is missing')")
    out = run_script(error_script, adapter, first=str(tmp_path / "broken"))
    assert out.startswith("imported\nImportError(\"peft_type='INTRINSIC' is a method of peft_intrinsic")
    assert "a library of scipy is missing" in out


@pytest.mark.slow
def test_a_broken_hook_is_reported_and_torch_peft_and_transformers_work(adapter, error_script, tmp_path):
    broken = tmp_path / "broken/peft_intrinsic_autoload"
    broken.mkdir(parents=True)
    code = (ROOT / "peft_intrinsic_autoload/__init__.py").read_text()
    (broken / "__init__.py").write_text(code.replace("PEFT_TYPE_TO_{table}", "MOVED_{table}"))
    assert run_script(error_script, adapter, first=str(tmp_path / "broken")) == "imported\nKeyError('INTRINSIC')\n"


def test_start_reports_what_it_cannot_do_and_never_raises(monkeypatch, caplog):
    monkeypatch.setattr(sys, "meta_path", None)
    peft_intrinsic_autoload.start()
    assert "did not register itself with PEFT" in caplog.text


def test_unknown_methods_raise_as_without_autoload():
    assert type(PEFT_TYPE_TO_CONFIG_MAPPING) is peft_intrinsic_autoload.Table
    assert "NOTHING" not in PEFT_TYPE_TO_CONFIG_MAPPING
    assert PEFT_TYPE_TO_CONFIG_MAPPING.get("NOTHING", "default") == "default"
    with pytest.raises(KeyError, match="NOTHING"):
        PEFT_TYPE_TO_CONFIG_MAPPING["NOTHING"]
    with pytest.raises(ValueError, match="'NOTHING' is not a valid PeftType"):
        PeftType("NOTHING")
    with pytest.raises(ValueError, match="is not a valid PeftType"):
        PeftType([])


def test_loading_is_watched_once():
    watched = PreTrainedModel.from_pretrained.__func__
    assert watched.watched
    assert not hasattr(watched.__wrapped__, "watched")
    assert sum(isinstance(finder, peft_intrinsic_autoload.Finder) for finder in sys.meta_path) == 1
    peft_intrinsic_autoload.start()
    assert sum(isinstance(finder, peft_intrinsic_autoload.Finder) for finder in sys.meta_path) == 1


@pytest.mark.parametrize(
    "look_up",
    [lambda table: table["INTRINSIC"], lambda table: table.get("INTRINSIC"), lambda table: "INTRINSIC" in table],
)
def test_the_first_lookup_of_a_method_registers_it_and_no_other_does(look_up, monkeypatch):
    table = peft_intrinsic_autoload.Table(LORA="lora")
    registered = []

    def register(method: str) -> None:
        registered.append(method)
        table[method] = "intrinsic"

    monkeypatch.setattr(peft_intrinsic_autoload, "_register", register)
    assert table["LORA"] == table.get("LORA") == "lora"
    assert registered == []
    assert look_up(table)
    assert look_up(table)
    assert registered == ["INTRINSIC"]


def test_models_load_where_missing_parameters_cannot_be_noted(caplog):
    class Replaced:
        """A library replaced transformers' method by one that ignores an option."""

        @classmethod
        def from_pretrained(cls, name, **options):
            return name

    class Changed:
        @classmethod
        def from_pretrained(cls, name, output_loading_info):
            return name, {}

    for models in (Replaced, Changed):
        watch(models)
        assert models.from_pretrained("model") == "model"
    assert "Unknown what the checkpoint of Changed lacks: KeyError('missing_keys')" in caplog.text


@pytest.fixture
def acted(monkeypatch, tmp_path) -> list[str]:
    """The actions of a finder that waits for the module `awaited`, which exists from now on."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/awaited.py").write_text("import started\nready = True")
    (tmp_path / "modules/started.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name in ("awaited", "started"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    seen: list[str] = []
    finder = peft_intrinsic_autoload.Finder({"awaited": lambda module: seen.append(module.ready)})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    return seen


def test_a_finder_acts_once_when_the_module_is_complete(acted):
    module = import_module("awaited")
    assert acted == [True]
    import_module("started")
    del sys.modules["awaited"]
    assert import_module("awaited") is not module
    assert acted == [True]


def test_a_finder_acts_on_a_module_whose_import_had_started(acted, monkeypatch):
    """Transformers' modules import torch themselves: the finder is added while `awaited` is being imported."""
    finder, *others = sys.meta_path
    monkeypatch.setattr(sys, "meta_path", others)
    (Path(sys.path[0]) / "started.py").write_text("start()")
    monkeypatch.setattr("builtins.start", lambda: others.insert(0, finder), raising=False)
    import_module("awaited")
    assert acted == []
    with pytest.raises(ModuleNotFoundError):
        import_module("absent_module")
    assert acted == [True]


def test_the_entry_point_is_installed():
    [entry] = [each for each in entry_points(group="torch.backends") if each.name == "peft_intrinsic"]
    assert entry.load() is peft_intrinsic_autoload.start


@pytest.mark.parametrize(
    ("file", "line"), [("pyproject.toml", 'Repository = "(.*)"'), ("CITATION.cff", "repository-code: (.*)")]
)
def test_every_file_names_the_same_repository(file, line):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(f"^{line}$", text, re.MULTILINE)[1] == REPOSITORY
