"""Step time and peak memory of this tuner and other methods, and the cost of attaching it to a 1 B model.

    python benchmarks/step.py [--threads N] [--repeats N] [--steps N] [--models small,base,decoder] [--device cpu|cuda]
        [--batch N] [--tokens N] [--block-size N,N] [--methods REGEX] [--clock wall|cpu] [--inference] [--csv FILE]

Models have random weights: small, a 22 M BERT (6 × 384); base, a 110 M BERT (12 × 768); decoder, a 135 M Llama
(30 × 576, tied). A step is forward, backward and fused AdamW in float32. Encoders classify 16 × 64 tokens, the decoder
models 8 × 64. With --inference, a step is a forward pass in evaluation mode. "head only" trains the classifier, or the
decoder's last norm: its head is tied to the embedding. PEFT's own methods train the classifier beside the adapter.
"directly" trains the same parameters themselves, with the classifier and without a projection: norms and biases (BitFit
and LayerNorm tuning), or biases of values. No tuner that adapts these parameters can be faster.

Prints a table per model, a row per method:
    trained          number of trainable parameters
    attach s, ms     seconds to attach the adapter; a step: median over rounds of a round's median
    ×LoRA, ×full     median over rounds of the ratio to the row "LoRA r=8" or "full" in the same round
    ×direct          the same to the row that trains the adapted parameters directly
    MB, above        peak resident (cuda: allocated) memory during a step; the same minus that of the bare model
    ×LoRA MB, …      ratios of "above"
then the targets with the measured values, then the attach test. Every method has its own process. Those of one model
run at the same time (add up their MB; --methods selects fewer) and take turns, in a new order each round, so that
other load affects all alike. On a busy machine `--threads 1 --clock cpu`, which counts processor time, varies less.

Nothing is timed unless each intrinsic model trains exactly d parameters and gives the same output merged and factored.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import multiprocessing
import os
import random
import re
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, TinyLoraConfig, UniLoraConfig, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from peft_intrinsic import IntrinsicConfig

Row = dict[str, Any]
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
CONFIGS = {
    "small": BertConfig(num_hidden_layers=6, hidden_size=384, intermediate_size=1536),
    "base": BertConfig(),
    "decoder": LlamaConfig(
        vocab_size=49152, tie_word_embeddings=True, **dict[str, Any](zip(NAMES, (576, 1536, 30, 9, 3), strict=True))
    ),
    "1B": LlamaConfig(
        vocab_size=128256, tie_word_embeddings=True, **dict[str, Any](zip(NAMES, (2048, 8192, 16, 32, 8), strict=True))
    ),
}
ENCODERS = ("small", "base")
LORA, FULL = "LoRA r=8", "full"
DIRECT = {"norms": "norms directly", "values": "values directly"}
"""Rows that train the parameters directly which rows of this tuner adapt, by the second word of these."""
COLUMNS = ("method", "trained", "attach s", "ms", "×LoRA", "×full", "×direct", "MB", "above", "×LoRA MB", "×full MB")
LIMITS = {
    "values": ("×direct", "1.03", ""),
    "norms": ("×direct", "1.03", ""),
    "linear": ("×LoRA", "1.15", "1.10"),
    "every": ("×full", "0.80", "0.50"),
}
TARGETS = ("method", "against", "time", "target", "memory", "target ")
# Freed buffers go back to the system at once, so that resident memory is memory in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


@dataclass(frozen=True)
class Job:
    """Settings of one process. `config` is a PEFT configuration class, "head", "full", or a key of `DIRECT`."""

    model: str
    config: Any
    options: Row
    device: str
    threads: int
    batch: int = 1
    tokens: int = 1
    clock: str = "wall"
    inference: bool = False


def methods(block_sizes: list[int | None]) -> dict[str, tuple[Any, Row]]:
    """List the rows of a table. PEFT's own methods have their default sizes."""
    linear: Row = {"target_modules": "all-linear"}
    rows: dict[str, tuple[Any, Row]] = {
        "head only": ("head", {}),
        LORA: (LoraConfig, {"r": 8, **linear}),
        "VeRA r=256": (VeraConfig, linear),
        "Uni-LoRA r=4 d=256": (UniLoraConfig, linear),
        "TinyLoRA r=2 u=64": (TinyLoraConfig, linear),
    }
    rows |= {name: (kind, {}) for kind, name in DIRECT.items()}
    rows["ours values d=200"] = (IntrinsicConfig, {"d": 200, "projection": "value_bias"})
    for size in block_sizes:
        for label, target in (("norms", "norms-and-biases"), ("linear", "all-linear"), ("every", "all")):
            for d in (200, 4096) if label == "norms" else (200, 4096, 65536):
                name = f"ours {label} d={d}" + (f" n={size}" if size else "")
                rows[name] = (IntrinsicConfig, {"d": d, "target_modules": target, "block_size": size})
    return {**rows, FULL: ("full", {})}


def attach(model: Any, job: Job) -> Any:
    """Prepare the model of one row for training."""
    if isinstance(job.config, type):
        task = "SEQ_CLS" if job.model in ENCODERS else "CAUSAL_LM"
        return get_peft_model(model, job.config(task_type=task, **job.options))
    if job.config == "head":
        model.requires_grad_(False)
        (model.classifier if job.model in ENCODERS else model.model.norm).requires_grad_(True)
    if job.config in DIRECT:
        model.requires_grad_(False)
        if job.model in ENCODERS:
            model.classifier.requires_grad_(True)
        for name, module in list(model.named_modules()):
            if job.config == "values" and name.endswith(("v_proj", "self.value")):
                module.bias = torch.nn.Parameter(torch.zeros(module.out_features, device=job.device))
            elif job.config == "norms":
                for p in module.parameters(recurse=False):
                    p.requires_grad_(p.dim() < 2)
    return model


@torch.no_grad()
def check(model: Any, parameters: list[torch.Tensor], batch: dict[str, torch.Tensor]) -> None:
    """Check that at a random θ the merged model gives the output of the factored one."""
    model.eval()
    few = {name: value[:2] for name, value in batch.items()}
    plain = model(**few).logits
    for p in parameters:
        p.normal_(std=1e-3)
    factored = model(**few).logits
    model.merge_adapter()
    error = float((model(**few).logits - factored).abs().max())
    model.unmerge_adapter()
    change = float((factored - plain).abs().max())
    for p in parameters:
        p.zero_()
    if not error < 1e-3 * change:
        raise AssertionError(
            f"merged and factored output differ by {error:.2g}; the adapter changes it by {change:.2g}"
        )


def read_memory(key: str) -> float:
    """Return MB resident now (VmRSS), or at most (VmHWM) since `reset_peak`."""
    return int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]) / 1024


def reset_peak(device: str) -> float:
    """Return MB in use now, and reset the peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    # Reset VmHWM, the kernel's own maximum, which excludes building the model and misses nothing as sampling would.
    Path("/proc/self/clear_refs").write_text("5")
    return read_memory("VmRSS")


def prepare(job: Job) -> tuple[Row, Callable[[], float]]:
    """Return the values known before timing, and a function that runs a step and returns its ms."""
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if job.model in ENCODERS else AutoModelForCausalLM
    with torch.device(job.device):
        model = auto.from_config(CONFIGS[job.model], dtype=torch.float32)
    ids = torch.randint(5, model.config.vocab_size, (job.batch, job.tokens), device=job.device)
    labels = ids[:, 0] % 2 if job.model in ENCODERS else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if job.device != "meta":
        model(**batch).loss.backward()  # the libraries' pages and work space count as part of the bare model
        model.zero_grad()
    base, start = reset_peak(job.device), time.perf_counter()
    model = attach(model, job)
    seconds = time.perf_counter() - start
    parameters = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in parameters)
    if job.config is IntrinsicConfig and count != job.options["d"]:
        raise AssertionError(f"{count} parameters are trainable, not d={job.options['d']}")
    clock = time.process_time if job.clock == "cpu" else time.perf_counter
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> float:
        start = clock()
        if job.inference:
            with torch.inference_mode():
                model(**batch)
        else:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if job.device == "cuda":
            torch.cuda.synchronize()
        return 1000 * (clock() - start)

    if job.device != "meta":
        if job.config is IntrinsicConfig:
            check(model, parameters, batch)
        model.train(not job.inference)
        reset_peak(job.device)
        step(), step()  # the first one makes the optimizer state
    peak = torch.cuda.max_memory_allocated() / 2**20 if job.device == "cuda" else read_memory("VmHWM")
    return {"trained": count, "attach s": seconds, "MB": peak, "above": peak - base}, step


def serve(pipe: Connection, job: Job) -> None:
    """Run the process of one row: send the prepared values, then receive step counts and send their median ms."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(job.threads)
    try:
        answer, step = prepare(job)
    except Exception as error:
        text = (str(error).splitlines() or [repr(error)])[0][:110]
        return pipe.send({"n/a": text, "wrong": isinstance(error, AssertionError)})
    pipe.send(answer)
    # From here on freed memory is retained, as is the default of glibc, so that page faults are not timed.
    for option, value in ((-3, 32 << 20), (-1, 1 << 30)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(option, value)
    while count := pipe.recv():
        step()  # refills the caches that the others emptied
        pipe.send(statistics.median(step() for _ in range(count)))


def launch(job: Job) -> tuple[Connection, Row]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=serve, args=(there, job), daemon=True).start()
    there.close()  # so that a dead process reads as the end of the pipe
    try:
        answer = here.recv()
    except EOFError:
        answer = {"n/a": "the process died"}
    if answer.pop("wrong", False):
        raise SystemExit(f"{job.model}, {job.options}: {answer['n/a']}. Nothing is timed.")
    return here, answer


def measure(jobs: dict[str, Job], repeats: int, steps: int) -> list[Row]:
    """Measure the rows of one model."""
    started = {name: launch(job) for name, job in jobs.items()}
    live = {name: pipe for name, (pipe, answer) in started.items() if "n/a" not in answer}
    rounds: list[dict[str, float]] = []
    for i in range(repeats):
        rounds.append({})
        for name in random.Random(i).sample(list(live), len(live)):
            live[name].send(steps)
            rounds[-1][name] = live[name].recv()
    rows = []
    for name, (pipe, answer) in started.items():
        rows.append(row := {"model": jobs[name].model, "method": name, **answer})
        if name in live:
            pipe.send(0)
            row["ms"] = statistics.median(times[name] for times in rounds) if rounds else ""
        direct = DIRECT.get(name.split()[1], "") if name.startswith("ours") else ""
        for key, other in (("×LoRA", LORA), ("×full", FULL), ("×direct", direct)):
            if name in live and other in live:
                row[key] = statistics.median(times[name] / times[other] for times in rounds)
                row[f"{key} MB"] = answer["above"] / started[other][1]["above"]
    return rows


def print_table(title: str, columns: tuple[str, ...], rows: list[Row]) -> None:
    """Print aligned columns. A row without values gives the reason."""
    cells = [list(columns)]
    for row in rows:
        values = [row.get(column, "") for column in columns]
        cells.append([f"{v:.{2 * (v < 10)}f}" if isinstance(v, float) else str(v) for v in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for line, row in zip(cells, [{}, *rows], strict=True):
        figures = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *([f"n/a: {row['n/a']}"] if "n/a" in row else figures)]), flush=True)


def compare(rows: list[Row], inference: bool) -> list[Row]:
    """Compare this tuner with direct training (values, norms), LoRA (linear layers) or full fine-tuning (every one)."""
    result = []
    for row in rows:
        key, *limits = next((limit for label, limit in LIMITS.items() if label in row["method"]), LIMITS["every"])
        if inference:
            limits = ["1.05" if key == "×direct" else "", ""]
        if row["method"].startswith("ours") and key in row:
            values = (f"{row['model']}: {row['method']}", key, row[key], limits[0], row[f"{key} MB"], limits[1])
            result.append(dict(zip(TARGETS, values, strict=True)))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"threads": 1, "repeats": 7, "steps": 3, "batch": 0, "tokens": 64, "models": "small,base,decoder"}
    for name, value in {**defaults, "block-size": "", "methods": "", "csv": ""}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--inference", action="store_true")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    args = parser.parse_args()
    os.environ.update(MALLOC)
    sizes: list[int | None] = [int(size) for size in args.block_size.split(",")] if args.block_size else [None]
    chosen = {name: row for name, row in methods(sizes).items() if re.search(args.methods, name)}
    rows: list[Row] = []
    for model in filter(None, args.models.split(",")):
        batch = args.batch or (16 if model in ENCODERS else 8)
        setting: Any = (args.device, args.threads, batch, args.tokens, args.clock, args.inference)
        jobs = {name: Job(model, *row, *setting) for name, row in chosen.items()}
        rows += (measured := measure(jobs, args.repeats, args.steps))
        title = f"{model}: {batch} × {args.tokens} tokens, {args.device}, threads {args.threads}, {args.clock} time"
        print_table(f"{title}, inference" if args.inference else title, COLUMNS, measured)
    print_table("targets (for the time of linear layers: at base)", TARGETS, compare(rows, args.inference))
    jobs = {name: Job("1B", *row, "meta", args.threads) for name, row in methods([None]).items() if "ours" in name}
    jobs = {name: job for name, job in jobs.items() if "values" not in name}  # these read the weights
    large = measure(jobs, 0, 0)
    print_table(
        "attach to 1 B on the meta device (targets: 2 s, 200 MB)", ("method", "trained", "attach s", "above"), large
    )
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["model", *COLUMNS, "×direct MB", "n/a"])
            writer.writeheader()
            writer.writerows(rows + large)


if __name__ == "__main__":
    main()
