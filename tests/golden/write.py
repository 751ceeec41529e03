"""Writes `written_by_d665cba/`: files of every kind that the package stores, with the options' former names.

Run with the code of commit d665cba in front of the present one:

    export TORCH_DEVICE_BACKEND_AUTOLOAD=0 PYTHONPATH=CHECKOUT:CHECKOUT/tests:CHECKOUT/tests/bounds:tests
    python tests/golden/write.py

`tests/test_golden.py` builds the same base models and compares outputs. Their weights are multiples of 1/512, so they
need no random generator and no file.
"""

# ruff: noqa: I001, RUF100  (it imports modules by their former names)
from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from helpers.golden import OUT, base, logits, measure
from peft import get_peft_model
from safetensors.torch import save_file

from peft_intrinsic import IntrinsicConfig

QUERIES = r".*query\.weight"
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "did": ("bert", {"d": 60}),
    "said": ("bert", {"d": 40, "said": True, "target_modules": "vectors", "seed": 3}),
    "all": ("bert", {"d": 50, "target_modules": "all", "projection": "global", "scale": "isometric", "block_size": 16}),
    "linear": ("bert", {"d": 30, "target_modules": ["query", "value"], "layers_to_transform": [1], "head": "keep"}),
    "new_head": ("headless", {"d": 60, "seed": 5, "task_type": "SEQ_CLS"}),
    "whole_head": ("headless", {"d": 20, "task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "head": "keep"}),
    "added_bias": ("llama", {"d": 40, "add_bias": True, "task_type": "CAUSAL_LM"}),
    "trajectory": ("bert", {"d": 3, "projection": "trajectory", "embed_subspace": True}),
}
PACKED = ("did", "said", "all", "linear", "new_head", "added_bias")


@torch.no_grad()
def fill_vectors(model: Any) -> None:
    """θ and λ, and what is trained beside them, from a formula."""
    vectors = model.get_base_model().intrinsic
    for p in (*(held["default"].weight for held in (vectors.intrinsic_theta, vectors.intrinsic_lambda) if held),):
        p.add_(((torch.arange(len(p)) * 29) % 61 - 30) / 1024)
    for name, p in model.named_parameters():
        if "modules_to_save" in name:
            p.copy_(((torch.arange(p.numel()) * 29) % 61 - 30).view(p.shape) / 512)


def write_adapters(folder: Path) -> None:
    from peft_intrinsic.codec import adapter_to_string, compress, load_packed
    from peft_intrinsic.trajectory import fit_subspace, record

    model = base("bert", folder)
    record(model, OUT / "recording", 0, parameters=QUERIES)
    for step in (1, 2):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("query.weight"):
                    p.add_(((torch.arange(p.numel()) * (31 + step)) % 53 - 26).view(p.shape) / 1024)
        record(model, OUT / "recording", step)
    fit_subspace(OUT / "recording", 2, out=folder / "subspace.safetensors")
    outputs, texts = {}, {}
    for name, (kind, options) in ADAPTERS.items():
        place = {"subspace": str(folder / "subspace.safetensors")} if name == "trajectory" else {}
        model = get_peft_model(base(kind, folder / "encoder"), IntrinsicConfig(**options, **place))
        fill_vectors(model)
        model.eval().peft_config["default"].base_model_name_or_path = "tiny"
        model.save_pretrained(OUT / "adapters" / name)
        (OUT / "adapters" / name / "README.md").unlink()
        outputs[name] = logits(model).contiguous()
        if name in PACKED:
            data = compress(model, levels=5)
            (OUT / "packed").mkdir(exist_ok=True)
            (OUT / "packed" / f"{name}.pia").write_bytes(data)
            texts[name] = adapter_to_string(data)
            outputs[f"{name}.pia"] = logits(load_packed(base(kind, folder / "encoder"), data)).contiguous()
    save_file(outputs, OUT / "outputs.safetensors")
    (OUT / "packed" / "texts.json").write_text(json.dumps(texts, indent=1) + "\n")


def write_runs() -> None:
    from peft_intrinsic.closeness import frozen_sweep
    from peft_intrinsic.measure import write_report

    for name, options in {"score": {"of": "score"}, "gain": {"of": "gain", "center": "mean"}}.items():
        whole = measure([], "right", out=OUT / "trials" / name, **options)
        with suppress(KeyboardInterrupt):
            measure([], "right", out=OUT / "trials" / f"{name}_stopped", stop=9, **options)
        write_report(whole, OUT / "trials" / name)
    frozen_sweep(lambda some, seed: 0.5 + len(some) / 8, ["a", "b", "c"], OUT / "trials" / "frozen", seeds=1)


COMMANDS: dict[str, list[str]] = {
    "transfer": ["--own", "run/one", "--full", "classifier", "--eval", "e.csv", "run/one", "run/two"],
    "outliers": ["--eval", "e.csv", "some/adapter"],
}


def write_commands() -> None:
    """Runs of commands whose options are a part of the keys of their rows."""
    from peft_intrinsic.measure.store import Store
    from peft_intrinsic_command import main

    from peft_intrinsic.trajectory import command

    for action, words in COMMANDS.items():
        found: list[Any] = []
        setattr(command, action, found.append)
        main(["trajectory", action, "--model", "some/model", "--train", "t.csv", "-o", "out", *words])
        with Store(OUT / "trials" / action, command._settings(found[0])) as store:
            store.add({"run": "zero-shot"}, {"accuracy": 0.5})


def write_texts(folder: Path) -> None:
    """A measurement on text, a study and a certificate, as the command line writes them."""
    from films import films  # films and texts are of the tests of that commit
    from peft_intrinsic_command import main
    from texts import examples

    os.chdir(folder)
    films(folder)
    main(["certify", "--train", "train.jsonl", "--test", "test.jsonl", "--adapter", "adapter", "--levels", "4,8"])
    for file in ("adapter.pia", "adapter.certificate.json"):
        shutil.copy(Path("adapter", file), OUT / "packed" / file)
    examples(folder)
    Path("more.yaml").write_text("max_steps: 120\nuse_cpu: true\ndataloader_pin_memory: false\n")
    data = [
        "--train",
        "train.jsonl",
        "--eval",
        "eval.csv",
        "--method",
        "said",
        "--batch",
        "8",
        "--config",
        "more.yaml",
        "--seeds",
        "1",
    ]
    asked = ["--dims", "8,512,4", "--target", "0.8", "--of", "gain", "--full-rates", "0.01", "--rates", "3e-4"]
    main(["measure", "--model", "base", *data, *asked, "--trials", "6", "--out", "text"])
    main(["study", "gap", "base", *data, *asked, "--sweep", "--out", "study"])
    for name, run in {"text": "text", "study": "study/base_said"}.items():
        shutil.copytree(run, OUT / "trials" / name, ignore=shutil.ignore_patterns("logs", "tokens"))


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    platform.node = lambda: "host"
    with tempfile.TemporaryDirectory() as scratch:
        write_adapters(Path(scratch))
        write_runs()
        write_commands()
        write_texts(Path(scratch))
    for report in OUT.rglob("report.json"):
        found = json.loads(report.read_text())
        told = {"answer": found["answers"][found["of"]], "baseline": found["baseline"], "stopped": found["stopped"]}
        report.with_name("found.json").write_text(json.dumps(told, indent=1) + "\n")
    for pattern in (".lock", "report.*", "curve.*"):
        for file in OUT.rglob(pattern):
            file.unlink()
