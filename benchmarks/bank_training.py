"""Step time of a bank that is trained, relative to one adapter for the whole batch, and bytes for each adapter.

    python benchmarks/bank_training.py [--threads N] [--repeats N] [--batch N] [--tokens N]

The model is all-MiniLM-L6-v2 with a head for six classes, d = 200. A step is forward, backward and optimizer, in
float32.
Each method trains on the same batch, whose samples belong to 1, 8 or 64 adapters:
    one adapter          one adapter for all samples, AdamW: all times are relative to it
    bank of K            `AdapterBank` with K rows, RowAdam
    one after the other  K attached adapters, each a step of its own on its samples: `set_adapter`, AdamW
    LoRA                 the same with LoRA r=8 on linear layers, and the head, which PEFT trains beside it
Times are of the processor. Each is the median over rounds of the ratio to it in the same round. Bytes are those
of the parameters of one adapter and of its optimizer.

The rows go to benchmarks/results/bank_training.jsonl, the figure to docs/bank_training.svg. Nothing is timed unless the
gradient of each row of the bank is that of its samples under the attached adapter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from carriers import minilm
from peft import LoraConfig, get_peft_model

from peft_intrinsic import AdapterBank, IntrinsicConfig, RowAdam
from peft_intrinsic.figures import save_figure, styled

ROOT = Path(__file__).parents[1]
RESULTS, FIGURE = ROOT / "benchmarks/results/bank_training.jsonl", ROOT / "docs/bank_training.svg"
COUNTS = (1, 8, 64)
SIZES = (10, 100, 1_000, 10_000, 100_000)
ONE = "one adapter"
Row = dict[str, Any]


def attach(config: Any, count: int = 1) -> Any:
    """MiniLM with newly initialized adapters `0`, `1`, …"""
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=6)
    model = get_peft_model(base, config(), adapter_name="0")
    for i in range(1, count):
        model.add_adapter(str(i), config())
    return model.train()


def intrinsic() -> IntrinsicConfig:
    return IntrinsicConfig(d=200, task_type="SEQ_CLS")


def lora() -> LoraConfig:
    return LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")


def count_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the parameters of an optimizer and of its state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in [*parameters, *state])


def step(optimizer: torch.optim.Optimizer, model: Any, inputs: dict[str, Any]) -> None:
    """One training step."""
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def in_turn(model: Any, inputs: dict[str, torch.Tensor], counts: Iterable[int]) -> tuple[dict[int, Any], int]:
    """Steps of attached adapters one after the other, by the number of adapters, and the bytes of one adapter."""
    optimizers = []
    for i in range(max(counts)):
        model.set_adapter(str(i))
        optimizers.append(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-4))

    def run(count: int) -> None:
        size = len(inputs["labels"]) // count
        for i, optimizer in enumerate(optimizers[:count]):
            model.set_adapter(str(i))
            step(optimizer, model, {name: value[i * size : (i + 1) * size] for name, value in inputs.items()})

    run(1)
    return {count: lambda count=count: run(count) for count in counts}, count_bytes(optimizers[0])


def check(bank: AdapterBank, inputs: dict[str, torch.Tensor]) -> None:
    """Raise SystemExit if the gradient of a row is not that of its samples alone."""
    bank.eval()
    index = [i % 8 for i in range(len(inputs["labels"]))]
    bank(adapter_index=index, **inputs).loss.backward()
    theta = bank.model.base_model.vector.intrinsic_theta[bank.adapter].weight
    for row in range(8):
        few = {name: value[row::8] for name, value in inputs.items()}
        (bank.model(**few).loss / 8).backward()
        found, expected = bank.vectors.grad.to_dense()[row], theta.grad
        if not (found - expected).norm() < 1e-3 * expected.norm():
            raise SystemExit(f"The gradient of row {row} differs from that of its samples alone. Nothing is timed.")
        theta.grad = None
    bank.zero_grad()
    bank.train()


def compare(calls: dict[Any, Callable[[], None]], repeats: int) -> dict[Any, float]:
    """Compute the median over rounds of each call's time as a multiple of the first one's."""
    ratios: dict[Any, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):  # the first round warms up
        times = {}
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name] = time.process_time() - start
        for name in calls if number else ():
            ratios[name].append(times[name] / next(iter(times.values())))
    return {name: statistics.median(values) for name, values in ratios.items()}


def measure(batch: int, tokens: int, repeats: int) -> list[Row]:
    """Measure all methods; rows with the number of adapters in the batch and in the bank, time and bytes."""
    inputs = {"input_ids": torch.randint(999, 30000, (batch, tokens)), "labels": torch.randint(6, (batch,))}
    calls: dict[tuple[str, int, int], Callable[[], None]] = {}
    sizes: dict[str, int] = {}
    turns = {"one after the other": attach(intrinsic, max(COUNTS)), "LoRA": attach(lora, max(COUNTS))}
    for name, model in turns.items():
        runs, sizes[name] = in_turn(model, inputs, COUNTS)
        calls |= {(name, count, count): call for count, call in runs.items()}
    calls = {(ONE, 1, 1): in_turn(attach(intrinsic), inputs, [1])[0][1], **calls}
    sizes[ONE] = sizes["one after the other"]
    model = attach(intrinsic)
    check(AdapterBank(model, 8), inputs)
    for size in SIZES:
        bank = AdapterBank(model, size)
        optimizer = RowAdam(bank.parameters(), 2e-4)
        for count in (count for count in COUNTS if count <= size):
            index = torch.arange(batch) * count // batch * (size // count)  # rows all over the bank
            calls["bank", count, size] = lambda bank=bank, optimizer=optimizer, index=index: step(
                optimizer, bank, {**inputs, "adapter_index": index}
            )
        calls["bank", 1, size]()
        sizes["bank"] = count_bytes(optimizer) // size
    return [
        {"method": method, "in_batch": count, "in_bank": size, "time": round(ratio, 3), "bytes": sizes[method]}
        for (method, count, size), ratio in compare(calls, repeats).items()
    ]


def print_table(rows: list[Row]) -> None:
    """Print a Markdown table with a column for each number of adapters in the batch."""
    found = {(row["method"], row["in_batch"], row["in_bank"]): row for row in rows}
    names = {f"bank of {size:,}": lambda count, size=size: found.get(("bank", count, size)) for size in SIZES}
    names |= {
        name: lambda count, name=name: found.get((name, count, count)) for name in ("one after the other", "LoRA")
    }
    print("| | bytes per adapter | " + " | ".join(f"{count} in the batch" for count in COUNTS) + " |")
    print("|---|" + "---|" * (len(COUNTS) + 1))
    for name, read in names.items():
        cells = [f"{row['time']:.2f}" if (row := read(count)) else "" for count in COUNTS]
        print(f"| {name} | {read(1)['bytes']:,} | {' | '.join(cells)} |")


@styled
def plot(rows: list[Row]) -> None:
    """Draw step time against the number of adapters in the batch."""
    figure = Figure((6, 3.6))
    axes = figure.subplots()
    curves = {
        "LoRA (r = 8), one after the other": ("LoRA", None, "C3o-"),
        "this package, one after the other": ("one after the other", None, "C0s--"),
        f"this package, bank of {SIZES[-1]:,}": ("bank", SIZES[-1], "C0o-"),
    }
    for label, (name, size, style) in curves.items():
        points = [row for row in rows if row["method"] == name and size in (None, row["in_bank"])]
        axes.plot([row["in_batch"] for row in points], [row["time"] for row in points], style, label=label)
    axes.set(xscale="log", yscale="log", xlabel="adapters in a batch of 64", ylabel="step time, one adapter = 1")
    axes.set_xticks(COUNTS, [str(count) for count in COUNTS], minor=False)
    axes.set_yticks((1, 2, 5, 10), ("1", "2", "5", "10"))
    axes.minorticks_off()
    axes.legend()
    save_figure(figure, FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"threads": 1, "repeats": 5, "batch": 64, "tokens": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    rows = measure(args.batch, args.tokens, args.repeats)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print_table(rows)
    plot(rows)


if __name__ == "__main__":
    main()
