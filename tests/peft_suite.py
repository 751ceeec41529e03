"""Run PEFT's tests of its tuners with this tuner instead of LoRA: `python tests/peft_suite.py SDIST [arguments]`.

SDIST is the unpacked source distribution of the installed PEFT (`pip download --no-deps --no-binary :all: peft==…`).
Further arguments are those of pytest. Nothing is loaded from the Hub: tiny random models have the names in the tests.

Two kinds of tests are run. Tests parametrized with LoRA's configuration get `IntrinsicConfig` with the options that it
has as well. Tests in `REPLACED`, which check on one tuner the behavior of all, get it too, unless they read parts of
that tuner. Tests in `DIFFERENT` must fail, because this tuner differs on purpose.
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
REPLACED = {  # class, tests in which it is replaced
    "LoKrConfig": "TestLoraConversion",
    "LoraConfig": "TestPeftCustomModel|TestLowCpuMemUsage|TestNoInfiniteRecursionDeepspeed|TestNamingConflictWarning"
    "|TestPeftStateDict|TestTarget|TestExcludedModuleNames|TestBaseTunerWarnForTiedEmbeddings|TestModulesToSave"
    "|TestGetBaseModelStateDict|TestModelAndLayerStatus::test_model_(enabl|disabl|active|merged|requires|avail|devices)",
}
LOKR = {"target_modules": [], "target_parameters": ["q_proj.weight", "v_proj.weight"]}  # without biases: convertible
FOREIGN = re.compile(  # parts of LoRA alone, bounds for LoKr's size, models that are not in MODELS
    r"lora_(A|B|embedding|magnitude)|\"lora_|\.lokr|dora|monteclora|combination_type|_restore_weights"
    r"|hotswap|divisible_by_groups|runtime_config|lora_to_lora|named_like_peft_prefix|C3AConfig|_LoraFactors"
    r"|lora_(approximates|with_multiple)|from_pretrained\(\"gpt2|Bloom"
)
DIFFERENT = {
    "to_save_correctly_set|automatic_modules|seq_cls_mixed|targets_tuner_layer": "a head is not trained fully",
    "test_prepare_for_training.*said": "embeddings are adapted too, so their output has a gradient",
    "layer_indexing": "θ is one tensor for any number of layers",
    "TestDefaultTargetModules": "no target_modules means norms, biases and the head",
    r"targeting_lora_to_embedding_layer\[.*auto": "embeddings are never saved, so no warning that they are",
    "test_inject_from_state_dict_and_from_config": "θ names no modules",
    "batches_(lora_conv2d|mha_raises)|on_top_level_module": "other modules can be mixed or targeted, and errors differ",
    r"PeftMixedModel|test_mixed_model_from|duplicate_name_without_mutation\[True": "PEFT mixes its own methods only",
    "targeting_trainable_tokens_raises": "the message names the remedy",
    "warning_naming_conflict_get_peft_model": "a name that is a part of θ's key raises",
    "naming_conflict_save_and_load": "a second adapter of the same name raises an error",
    "modules_to_save_merging_adapters": "fully trained modules have no exact sum",
    "test_load_resized_embedding": "an adapter belongs to the shapes that it was trained on",
}
MODELS = {  # beginnings of names, and their ends
    "peft-internal-testing/tiny-random-": "OPTForCausalLM GPT2LMHeadModel GPTJForCausalLM LlamaForCausalLM BertModel "
    "BartForConditionalGeneration T5ForConditionalGeneration-calibrated RobertaModel DebertaModel DebertaV2Model "
    "BertForSequenceClassification RobertaForSequenceClassification",
    "trl-internal-testing/tiny-": "random-LlamaForCausalLM LlamaForSequenceClassification-3.2 Llama4ForCausalLM "
    "GptOssForCausalLM",
    "": "peft-internal-testing/tiny-dummy-qwen2 hf-internal-testing/tiny-random-Gemma3ForCausalLM bert-base-uncased",
}
KINDS = {"qwen2": "Qwen2ForCausalLM", "uncased": "BertForSequenceClassification"}  # for names without a class
SIZES = {  # values of the integers in a configuration, by a pattern of the name
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
            keys = [key for key, value in vars(model.config_class()).items() if type(value) is int]
            sizes = {key: size for key in keys for pattern, size in SIZES.items() if re.fullmatch(pattern, key)}
            torch.manual_seed(0)
            config = model.config_class(**sizes, pad_token_id=0, decoder_start_token_id=0)
            model(config).save_pretrained(folder / f"{start}{name}")
    IntrinsicConfig().save_pretrained(folder / "peft-internal-testing" / "tiny-opt-lora-revision")


def translate_options(given: dict[str, Any]) -> dict[str, Any]:
    """Select the options of another tuner that `IntrinsicConfig` has too."""
    options = {key: value for key, value in given.items() if key in IntrinsicConfig.__dataclass_fields__}
    options.setdefault("d", 12 if options.get("said") else 3)  # some models have three adapted weights
    return options | ({"init_weights": bool(given["init_lora_weights"])} if "init_lora_weights" in given else {})


def is_lora(value: Any) -> bool:
    """Whether a value of a row is LoRA's configuration, a class or an instance."""
    return value is LoraConfig or type(value) is LoraConfig


def translate(name: str, value: Any) -> Any:
    """Replace LoRA's configuration in a value of a row of PEFT."""
    if is_lora(value):
        return IntrinsicConfig if value is LoraConfig else IntrinsicConfig(**translate_options(vars(value)))
    return "intrinsic" if name == "tuner_method" else translate_options(value) if isinstance(value, dict) else value


def translate_rows(names: list[str], rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Translate LoRA's rows, each once, and add rows that adapt every parameter, with λ."""
    result: dict[str, tuple[Any, ...]] = {}
    for row in rows:
        tokens = any(
            "trainable_token_indices" in v for v in row if isinstance(v, dict)
        )  # of a model selected by the name of LoRA
        if not any(map(is_lora, row)) or tokens:
            continue
        variants = [dict(zip(names, map(translate, names, row), strict=True))]
        options = variants[0].get("config_kwargs", {"target_parameters": None})
        if (
            "target_parameters" not in options and "Conv2dGroups2" not in row
        ):  # which overflows when all parameters are adapted
            task = {key: value for key, value in options.items() if key == "task_type"}
            whole = {"said": True, "target_modules": "all", "scale": "isometric"}  # SGD at 0.5 overflows with fan_in
            variants.append({**variants[0], "config_kwargs": translate_options({**task, **whole})})
            if options.get("target_modules") is None:
                variants[0]["config_kwargs"] = translate_options({**task, "target_modules": "all-linear"})
        for variant in variants:
            result.setdefault(repr({**variant, "test_name": None}), tuple(variant.values()))
    return list(result.values())


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        if mark.name == "parametrize":
            names = [name.strip() for name in mark.args[0].split(",")]
            rows = [getattr(row, "values", row) if hasattr(row, "marks") else row for row in mark.args[1]]
            if new := translate_rows(names, [row if isinstance(row, tuple) else (row,) for row in rows]):
                marks[i] = pytest.mark.parametrize(names, new, ids=lambda v: str(v) if type(v) is dict else None).mark


def select(item: Any) -> bool:
    """Whether a test is run. Stores the name of the class that is replaced in it."""
    item.replaced, values = None, item.callspec.params.values() if hasattr(item, "callspec") else ()
    if any(value is IntrinsicConfig or isinstance(value, IntrinsicConfig) for value in values):
        return FOREIGN.search(item.name) is None
    fixtures = [found[-1].func for found in item._fixtureinfo.name2fixturedefs.values()]
    code = "".join(map(inspect.getsource, [item.function, *fixtures]))
    if not any(map(is_lora, values)) and FOREIGN.search(code) is None:
        names = [name for name, tests in REPLACED.items() if re.search(tests, item.nodeid) and f"{name}(" in code]
        item.replaced = names[0] if names else None
    return item.replaced is not None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    selected = [item for item in items if select(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected
    for item in items:
        for reason in (reason for pattern, reason in DIFFERENT.items() if re.search(pattern, item.nodeid)):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: Any) -> Iterator[None]:
    defaults = LOKR if item.replaced == "LoKrConfig" else {}
    config = (
        {item.replaced: lambda **given: IntrinsicConfig(**defaults | translate_options(given))} if item.replaced else {}
    )
    with patch.multiple(item.module, **config) if config else nullcontext():
        return (yield)


def main(sdist: str, *arguments: str) -> int:
    """Run the tests. Returns pytest's exit status."""
    root = Path(sdist).resolve()
    if f"\nVersion: {version('peft')}\n" not in (root / "PKG-INFO").read_text(encoding="utf-8"):
        sys.exit(f"{root} is not the source of the installed PEFT, {version('peft')}.")
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    for name in ("diffusers", "parameterized"):  # imported by the tests, but not used in those that run
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
