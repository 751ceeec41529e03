"""PEFT's own tests of its tuners, with ours in LoRA's place: `python tests/peft_suite.py SDIST [pytest arguments]`.

SDIST is the unpacked source distribution of the installed PEFT (`pip download --no-deps --no-binary :all: peft==…`).
Nothing comes from the Hub: tiny random models lie under the names that the tests ask for.

Two kinds of tests are run. Those parametrised with LoRA's configuration get ours instead, with the same options as far
as we have them. Those in `STAND_INS`, which try on one tuner what all tuners share, see our configuration in its place,
unless they look at that tuner's own parts. What must fail, because we differ on purpose, is in `DIFFERENT`.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import huggingface_hub
import pytest
import torch
import transformers
from peft import LoraConfig

from peft_intrinsic import IntrinsicConfig

FILES = (
    "custom_models decoder_models encoder_decoder_models feature_extraction_models seq_classifier "
    "token_classification_qa target_parameters config low_level_api other initialization lora_conversion tuners_utils"
)
STAND_INS = {  # which name, in which tests
    "LoKrConfig": "TestLoraConversion",
    "LoraConfig": "TestPeftCustomModel|TestLowCpuMemUsage|TestNoInfiniteRecursionDeepspeed|TestNamingConflictWarning"
    "|TestPeftStateDict|TestTarget|TestExcludedModuleNames|TestBaseTunerWarnForTiedEmbeddings|TestModulesToSave"
    "|TestGetBaseModelStateDict|TestModelAndLayerStatus::test_model_(enabl|disabl|active|merged|requires|avail|devices)",
}
LOKR = {"target_modules": [], "target_parameters": ["q_proj.weight", "v_proj.weight"]}  # without biases: convertible
FOREIGN = re.compile(  # what only LoRA has, bounds that fit LoKr's size, models not in MODELS
    r"lora_(A|B|embedding|magnitude)|\"lora_|\.lokr|dora|monteclora|combination_type|_restore_weights"
    r"|hotswap|divisible_by_groups|runtime_config|lora_to_lora|named_like_peft_prefix|C3AConfig|_LoraFactors"
    r"|lora_(approximates|with_multiple)|from_pretrained\(\"gpt2|Bloom"
)
DIFFERENT = {
    "to_save_correctly_set|automatic_modules|seq_cls_mixed|targets_tuner_layer": "a head is not trained in full",
    "test_prepare_for_training.*said": "embeddings are moved too, so what comes out of them has a gradient",
    "layer_indexing": "θ is one tensor, however few layers it moves",
    "TestDefaultTargetModules": "no target_modules means norms, biases and the head",
    r"targeting_lora_to_embedding_layer\[.*auto": "embeddings are never saved, so no warning that they are",
    "test_inject_from_state_dict_and_from_config": "θ names no modules",
    "batches_(lora_conv2d|mha_raises)|on_top_level_module": "what can be mixed or targeted, and what a refusal says",
    r"PeftMixedModel|test_mixed_model_from|duplicate_name_without_mutation\[True": "PEFT mixes its own methods only",
    "targeting_trainable_tokens_raises": "the message names the remedy",
    "warning_naming_conflict_get_peft_model": "a name that is a part of θ's key raises",
    "naming_conflict_save_and_load": "a second adapter of the same name is refused",
    "modules_to_save_merging_adapters": "modules that are trained in full have no exact sum",
    "test_load_resized_embedding": "an adapter belongs to the shapes that it was trained on",
}
MODELS = {  # start of the names, and how they go on
    "peft-internal-testing/tiny-random-": "OPTForCausalLM GPT2LMHeadModel GPTJForCausalLM LlamaForCausalLM BertModel "
    "BartForConditionalGeneration T5ForConditionalGeneration-calibrated RobertaModel DebertaModel DebertaV2Model "
    "BertForSequenceClassification RobertaForSequenceClassification",
    "trl-internal-testing/tiny-": "random-LlamaForCausalLM LlamaForSequenceClassification-3.2 Llama4ForCausalLM "
    "GptOssForCausalLM",
    "": "peft-internal-testing/tiny-dummy-qwen2 hf-internal-testing/tiny-random-Gemma3ForCausalLM bert-base-uncased",
}
KINDS = {"qwen2": "Qwen2ForCausalLM", "uncased": "BertForSequenceClassification"}  # where the name does not tell
SIZES = {  # of every whole number in a configuration, by its name
    "vocab_size": 1000,
    "max_position_embeddings|n_positions": 64,
    r"intermediate_size\w*|\w*ffn_dim|d_ff": 32,
    r"\w*hidden_size|n_embd|d_model|word_embed_proj_dim": 16,
    "num_attention_heads|n_head|(en|de)coder_attention_heads|num_heads|head_dim|rotary_dim|d_kv|num_local_experts": 4,
    "num_hidden_layers|n_layer|(en|de)coder_layers|num_layers|num_decoder_layers|num_key_value_heads": 2,
}


def save_models(folder: Path) -> None:
    """Write every model of `MODELS`, and an adapter, to the paths that are their names on the Hub."""
    for start, names in MODELS.items():
        for name in names.split():
            kind = next((part for part in name.split("-") if hasattr(transformers, part)), None)
            model: Any = getattr(transformers, kind or KINDS[name.rpartition("-")[2]])
            numbers = [key for key, value in vars(model.config_class()).items() if type(value) is int]
            sizes = {key: size for key in numbers for pattern, size in SIZES.items() if re.fullmatch(pattern, key)}
            torch.manual_seed(0)
            config = model.config_class(**sizes, pad_token_id=0, decoder_start_token_id=0)
            model(config).save_pretrained(folder / f"{start}{name}")
    IntrinsicConfig().save_pretrained(folder / "peft-internal-testing" / "tiny-opt-lora-revision")


def ours(given: dict[str, Any]) -> dict[str, Any]:
    """The options of another tuner that we have too."""
    kept = {key: value for key, value in given.items() if key in IntrinsicConfig.__dataclass_fields__}
    kept.setdefault("d", 12 if kept.get("said") else 3)  # some of the models move three weights
    return kept | ({"init_weights": bool(given["init_lora_weights"])} if "init_lora_weights" in given else {})


def is_lora(value: Any) -> bool:
    """Whether a value of a row is LoRA's configuration, as a class or made."""
    return value is LoraConfig or type(value) is LoraConfig


def translated(name: str, value: Any) -> Any:
    """A value of a row of PEFT's, with ours in the place of LoRA's."""
    if is_lora(value):
        return IntrinsicConfig if value is LoraConfig else IntrinsicConfig(**ours(vars(value)))
    return "intrinsic" if name == "tuner_method" else ours(value) if isinstance(value, dict) else value


def rows_for_us(names: list[str], rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """LoRA's rows with our configuration, each once; and rows that move every parameter, with λ."""
    found: dict[str, tuple[Any, ...]] = {}
    for row in rows:
        tokens = any(
            "trainable_token_indices" in v for v in row if isinstance(v, dict)
        )  # of a model chosen by LoRA's name
        if not any(map(is_lora, row)) or tokens:
            continue
        variants = [dict(zip(names, map(translated, names, row), strict=True))]
        options = variants[0].get("config_kwargs", {"target_parameters": None})
        if "target_parameters" not in options and "Conv2dGroups2" not in row:  # that one overflows when all is trained
            task = {key: value for key, value in options.items() if key == "task_type"}
            whole = {"said": True, "target_modules": "all", "scale": "isometric"}  # in other units SGD at 0.5 overflows
            variants.append({**variants[0], "config_kwargs": ours({**task, **whole})})
            if options.get("target_modules") is None:
                variants[0]["config_kwargs"] = ours({**task, "target_modules": "all-linear"})
        for variant in variants:
            found.setdefault(repr({**variant, "test_name": None}), tuple(variant.values()))
    return list(found.values())


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        if mark.name == "parametrize":
            names = [name.strip() for name in mark.args[0].split(",")]
            rows = [getattr(row, "values", row) if hasattr(row, "marks") else row for row in mark.args[1]]
            if new := rows_for_us(names, [row if isinstance(row, tuple) else (row,) for row in rows]):
                marks[i] = pytest.mark.parametrize(names, new, ids=lambda v: str(v) if type(v) is dict else None).mark


def chosen(item: Any) -> bool:
    """Whether a test concerns us; notes which name stands for our configuration in it."""
    item.stand_in, values = None, item.callspec.params.values() if hasattr(item, "callspec") else ()
    if any(value is IntrinsicConfig or isinstance(value, IntrinsicConfig) for value in values):
        return FOREIGN.search(item.name) is None
    fixtures = [found[-1].func for found in item._fixtureinfo.name2fixturedefs.values()]
    code = "".join(map(inspect.getsource, [item.function, *fixtures]))
    if not any(map(is_lora, values)) and FOREIGN.search(code) is None:
        names = [name for name, tests in STAND_INS.items() if re.search(tests, item.nodeid) and f"{name}(" in code]
        item.stand_in = names[0] if names else None
    return item.stand_in is not None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    kept = [item for item in items if chosen(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in items:
        for reason in (reason for pattern, reason in DIFFERENT.items() if re.search(pattern, item.nodeid)):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: Any) -> Iterator[None]:
    defaults = LOKR if item.stand_in == "LoKrConfig" else {}
    config = {item.stand_in: lambda **given: IntrinsicConfig(**defaults | ours(given))} if item.stand_in else {}
    with patch.multiple(item.module, **config) if config else nullcontext():
        return (yield)


def main(sdist: str, *arguments: str) -> int:
    """Run the tests. Returns pytest's exit status."""
    root = Path(sdist).resolve()
    if f"\nVersion: {version('peft')}\n" not in (root / "PKG-INFO").read_text(encoding="utf-8"):
        sys.exit(f"{root} is not the source of the installed PEFT, {version('peft')}.")
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    for name in ("diffusers", "parameterized"):  # imported by the tests, but what we run does not need them
        sys.modules[name] = stub = ModuleType(name)
        vars(stub).update(__spec__=ModuleSpec(name, None), __version__="0", StableDiffusionPipeline=Path)
    vars(stub)["parameterized"] = SimpleNamespace(expand=lambda rows: pytest.mark.skip)
    sys.path.insert(0, str(root))
    testing_utils: Any = import_module("tests.testing_utils")
    testing_utils.hub_online_once = lambda name: nullcontext()
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder))
        os.chdir(folder)
        Path("pytest.ini").write_text("[pytest]\nconsider_namespace_packages = true\n")
        files = [str(root / "tests" / f"test_{name}.py") for name in FILES.split()]
        options = ["-c", "pytest.ini", f"--rootdir={root}", "--import-mode=importlib", "-p", "no:cacheprovider"]
        return pytest.main([*options, "-W", "ignore", *arguments, *files], plugins=[sys.modules[__name__]])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
