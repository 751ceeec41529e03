"""Reads and loads mutated packed adapters: `python tests/codec/fuzz.py --cases 100000 --seed 0`. Fails on a finding."""

from __future__ import annotations

import argparse
import copy
import random
import resource
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from helpers.samples import GOLDEN, base_of, resealed

from peft_intrinsic.codec import PackedAdapter, adapter_from_string, adapter_to_string, load_packed
from peft_intrinsic.codec.quantize import quantize

SECONDS, MEBIBYTES = 2.0, 640
"""Limits of a case: CPU time, and memory above that before the first case."""

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_= +/\nä"


def mutate(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Truncate data, flip bits, splice another file, or replace, insert or delete bytes."""
    start, length = chance.randrange(len(data) + 1), chance.choice((1, 1, 1, 1, 2, 3, 8, 40))
    kind = chance.choice((0, 1, 1, 1, 2, 3, 3, 4, 5))
    if kind == 0:
        return data[:start]
    if kind == 1:
        changed = bytearray(data)
        for _ in range(length):
            changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return bytes(changed)
    if kind == 2:
        return data[:start] + other[chance.randrange(len(other)) :]
    if kind == 3:
        return data[:start] + chance.randbytes(length) + data[start + length :]
    if kind == 4:
        return data[:start] + chance.choice((chance.randbytes(length), b"\xff" * length)) + data[start:]
    return data[:start] + data[start + length :]


def rewrite(packed: PackedAdapter, chance: random.Random) -> bytes:
    """Write a well-formed file with one or two wrong fields."""
    options, m = dict(packed.options), len(packed.scales)
    values = np.concatenate([packed.theta, packed.scales])
    changes: dict[str, Any] = {}
    kinds = ("option", "d", "m", "block_size", "reinitialized", "seed", "values")
    for kind in chance.choices(kinds, k=chance.choice((1, 2))):
        if kind == "option":
            name = chance.choice(list(options))
            options[name] = chance.choice(VALUES.get(name, STRANGE))
        elif kind == "d":
            values = np.resize(values, chance.choice((1, 2, len(values) + 1, len(values) - 1, 500)) or 1)
        elif kind == "m":
            m = chance.choice((0, 1, m + 1, len(values) - 1))
        elif kind == "block_size":
            changes["block_size"] = 1 << chance.randrange(64)
        elif kind == "reinitialized":
            indexes = range(chance.choice((5, 41, 100, 2**32)))
            changes["reinitialized"] = sorted(chance.sample(indexes, chance.randrange(4)))
        elif kind == "seed":
            changes["seed"] = chance.randrange(2**63)
        else:
            values = values * np.float32(2.0 ** chance.randrange(-60, 60))
    m = min(m, len(values) - 1)
    options["said"] = m > 0
    theta, scales = np.split(values, [len(values) - m])
    changes |= {"d": len(values), "theta": quantize(theta, chance.choice((1, 3, 16))), "scales": scales}
    return replace(packed, options=options, **changes).to_bytes()


def mutate_text(text: str, chance: random.Random) -> str:
    """Replace, insert or delete characters of the text form."""
    start = chance.randrange(len(text))
    return text[:start] + chance.choice(("", chance.choice(ALPHABET))) + text[start + chance.randrange(3) :]


STRANGE: list[Any] = [
    *(None, 0, 1, -1, 2**70, 1.5, True, "", "x", ".*", "(", "*", "all-linear", "layers", "\0", "größe"),
    *("norms-and-biases", [], [1], [0, 1], ["query"], ["weight"], ["(", None], [[]], {}, {"a": 1}, float("nan")),
    *("(a+)+b", ["bias"] * 400),
]
"""Values of options that the file has in JSON."""

VALUES: dict[str, list[Any]] = {
    "said": [False, True],
    "add_bias": [False, True],
    "lambda_granularity": ["layer", "module", "tensor"],
    "projection": ["fastfood", "global", "dense"],
    "scale": ["fan_in", "isometric"],
    "head": ["subspace", "keep"],
    "task_type": [None, "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"],
}
"""Values of all other options."""


def measure_growth(before: int) -> float:
    """Memory of this process above `before`, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit


def run_case(data: bytes | str, base: torch.nn.Module) -> tuple[str, str]:
    """Read and load one case; return the outcome and the message."""
    stage = "reading"
    try:
        if isinstance(data, str):
            adapter_from_string(data)
            return "text read", ""
        PackedAdapter.from_bytes(data)
        stage = "loading"
        load_packed(copy.deepcopy(base), data, check_base=False)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # Rust's panics are no Exception
        if str(error) and (type(error) is ValueError or (stage == "loading" and isinstance(error, ValueError))):
            return f"raised when {stage}", str(error)
        return f"BAD {type(error).__name__} when {stage}", str(error)
    return "loaded", ""


def main() -> int:
    """Run the cases and print a line; return 1 if there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    files = [(path.read_bytes(), base_of(path)) for path in GOLDEN]
    for whole, base in files:
        load_packed(copy.deepcopy(base), whole, check_base=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter()
    slowest, memory, started = 0.0, 0.0, time.perf_counter()
    for case in range(options.cases):
        whole, base = chance.choice(files)
        changed = whole
        for _ in range(chance.choice((1, 1, 1, 1, 2, 3))):
            changed = mutate(changed, chance.choice(files)[0], chance) or b"PIA"
        if chance.random() < 0.8:
            changed = resealed(changed)
        if chance.random() < 0.1:
            changed = rewrite(PackedAdapter.from_bytes(whole), chance)
        data: bytes | str = changed
        if chance.random() < 0.15:
            data = mutate_text(adapter_to_string(chance.choice((whole, changed))), chance)
        clock = time.process_time()
        outcome, message = run_case(data, base)
        seconds = time.process_time() - clock
        slowest, more = max(slowest, seconds), measure_growth(before)
        if seconds > SECONDS or more > max(memory, MEBIBYTES):
            outcome = f"BAD {seconds:.1f} s, {more:.0f} MiB: {outcome}"
        memory = max(memory, more)
        outcomes[outcome] += 1
        if outcome.startswith("BAD") and outcomes[outcome] <= 3:
            shown = data.hex() if isinstance(data, bytes) else repr(data)
            print(f"case {case}: {outcome}: {message[:150]}: {shown}", flush=True)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"{options.cases} cases of seed {options.seed}: {counts};", end=" ")
    print(f"at most {slowest:.2f} s and {memory:.0f} MiB more memory; {time.perf_counter() - started:.0f} s in all")
    return int(any(outcome.startswith("BAD") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
