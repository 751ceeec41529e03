"""Check that other programs load adapters without importing this package: `python tests/programs.py [PROGRAM …]`.

`make test-programs` runs it in its own environment, without pytest. Each program runs on a tiny random model, on the
model with an adapter, and with the adapter merged. The last two results must agree, and differ from the first.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.card import HEADING

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = ["<pad>", "<unk>", "<eos>", "a", "very", "good", "bad", "film"]
ROWS = ["a very good film", "a bad film", "very very bad", "good film a good film"]
OPTIONS: dict[str, Any] = {"d": 60, "init_weights": False, "target_modules": "all"}

LM_EVAL_TASK = """
task: films
dataset_path: json
dataset_kwargs: {data_files: {test: data/train.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""

SENTENCES = """import json, sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
for adapter in sys.argv[2:]:
    model.load_adapter(adapter)
print(json.dumps(model.encode(["a very good film", "bad"]).tolist()))
"""


def save(model: PreTrainedModel, folder: Path) -> str:
    """Save a model and its tokenizer. Its weights are scaled to trained ones, so that its output depends on them."""
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)


def save_decoders(folder: Path) -> tuple[str, str, str]:
    """Save a base model, an adapter, and both merged."""
    base = save(LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **SIZES)), folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), IntrinsicConfig(**OPTIONS))
    model.save_pretrained(folder / "adapter")
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(folder / "merged")
    (folder / "data").mkdir()
    (folder / "data/train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return base, str(folder / "adapter"), str(folder / "merged")


def run(*command: str, cwd: Path) -> str:
    """Run a program with the installed package and without the Hub. Return its output."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = (str(Path(sys.executable).parent / command[0]), *command[1:])
    print("$", *command, flush=True)
    done = subprocess.run(
        command, cwd=cwd, env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def compare(name: str, base: float, adapter: float, merged: float) -> None:
    """Print three results, and exit with an error if they are wrong."""
    print(f"{name}: base {base:.6f}, adapter {adapter:.6f}, merged {merged:.6f}", flush=True)
    if not math.isclose(adapter, merged, rel_tol=1e-4) or math.isclose(adapter, base, rel_tol=1e-2):
        sys.exit(f"{name} did not use the adapter")


def lm_eval(folder: Path) -> None:
    """Run the evaluation harness on a local task."""
    base, adapter, merged = save_decoders(folder)
    (folder / "films.yaml").write_text(LM_EVAL_TASK)
    perplexities = []
    for model in (base, f"{base},peft={adapter}", merged):
        options = ["--tasks", "films", "--include_path", ".", "--device", "cpu", "--output_path", "out.json"]
        run("lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", *options, cwd=folder)
        [path] = folder.glob("out*.json")
        perplexities.append(json.loads(path.read_text())["results"]["films"]["word_perplexity,none"])
        path.unlink()
    compare("lm_eval, word perplexity", *perplexities)


def trl(folder: Path) -> None:
    """Run TRL's `sft` command. Its `--model_name_or_path` has the files of an adapter and of the base model."""
    base, adapter, merged = save_decoders(folder)
    shutil.copytree(base, adapter, dirs_exist_ok=True)
    losses = []
    for model in (base, adapter, merged):
        options = {"dataset_name": "data", "output_dir": "out", "max_steps": 1, "learning_rate": 0, "use_cpu": True}
        options |= {"dtype": "float32", "bf16": False, "logging_steps": 1, "save_steps": 1, "report_to": "none"}
        options |= {"per_device_train_batch_size": len(ROWS), "seed": 0}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        run("trl", "sft", "--model_name_or_path", model, *arguments, cwd=folder)
        state = json.loads((folder / "out/checkpoint-1/trainer_state.json").read_text())
        losses.append(state["log_history"][0]["loss"])
        if model == adapter:
            config = json.loads((folder / "out/adapter_config.json").read_text())
            assert config["peft_type"] == "INTRINSIC"
            assert HEADING in (folder / "out/README.md").read_text(encoding="utf-8")
    compare("trl sft, training loss", *losses)


def sentence_transformers(folder: Path) -> None:
    """Load a model saved with its adapter, and an adapter into a model. Run the page's blocks on a tiny model."""
    base = save(BertModel(BertConfig(vocab_size=len(WORDS), **SIZES)), folder / "base")
    model = SentenceTransformer(modules=[Transformer(base), Pooling(SIZES["hidden_size"])], device="cpu")
    model.save(str(folder / "plain"))
    model.add_adapter(IntrinsicConfig(**OPTIONS))
    model.save(str(folder / "model"))
    card = (folder / "model/README.md").read_text(encoding="utf-8")
    assert next(line for line in card.splitlines() if line.startswith("## ")) == HEADING, card
    expected = torch.tensor(model.encode(["a very good film", "bad"]))

    (folder / "encode.py").write_text(SENTENCES)

    def embed(*arguments: str) -> torch.Tensor:
        return torch.tensor(json.loads(run("python", "encode.py", *arguments, cwd=folder)))

    plain = (embed("plain") - expected).abs().max().item()
    print(f"sentence-transformers, largest difference: base {plain:.6f}")
    assert plain > 0.01
    for arguments in (["model"], ["plain", "model"]):
        torch.testing.assert_close(embed(*arguments), expected)
    print("sentence-transformers, largest difference: adapter 0")

    save(BertModel(BertConfig(vocab_size=len(WORDS), **SIZES)), folder / "sentence-transformers/all-MiniLM-L6-v2")
    page = Path(__file__).parents[1] / "docs/sentence_transformers.md"
    blocks = re.findall(r"^```python\n(.+?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (folder / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    run("python", "page.py", cwd=folder)
    print(f"sentence-transformers, blocks of {page.name}: {len(blocks)}")


if __name__ == "__main__":
    programs = {"lm_eval": lm_eval, "trl": trl, "sentence-transformers": sentence_transformers}
    for name in sys.argv[1:] or programs:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as place:
            programs[name](Path(place))
