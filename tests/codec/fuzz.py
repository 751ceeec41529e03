"""Mutated packed adapters, many of them: `python tests/codec/fuzz.py --cases 100000 --seed 0`. Fails on a finding."""

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
"""What a case may take: of the processor's time, and of memory more than before the first case."""

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_= +/\nä"


def mutated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """One change: a cut, flipped bits, another file's part, random bytes, some more or some less."""
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


def rewritten(packed: PackedAdapter, chance: random.Random) -> bytes:
    """A well-formed file with one or two fields that do not belong there."""
    options, m = dict(packed.options), len(packed.scales)
    numbers = np.concatenate([packed.theta, packed.scales])
    changes: dict[str, Any] = {}
    for kind in chance.choices(
        ("option", "d", "m", "block_size", "reinitialized", "seed", "numbers"), k=chance.choice((1, 2))
    ):
        if kind == "option":
            name = chance.choice(list(options))
            options[name] = chance.choice(VALUES.get(name, STRANGE))
        elif kind == "d":
            numbers = np.resize(numbers, chance.choice((1, 2, len(numbers) + 1, len(numbers) - 1, 500)) or 1)
        elif kind == "m":
            m = chance.choice((0, 1, m + 1, len(numbers) - 1))
        elif kind == "block_size":
            changes["block_size"] = 1 << chance.randrange(64)
        elif kind == "reinitialized":
            changes["reinitialized"] = sorted(
                chance.sample(range(chance.choice((5, 41, 100, 2**32))), chance.randrange(4))
            )
        elif kind == "seed":
            changes["seed"] = chance.randrange(2**63)
        else:
            numbers = numbers * np.float32(2.0 ** chance.randrange(-60, 60))
    m = min(m, len(numbers) - 1)
    options["said"] = m > 0
    theta, scales = np.split(numbers, [len(numbers) - m])
    changes |= {"d": len(numbers), "theta": quantize(theta, chance.choice((1, 3, 16))), "scales": scales}
    return replace(packed, options=options, **changes).to_bytes()


def mutated_text(text: str, chance: random.Random) -> str:
    """One change of the text form."""
    start = chance.randrange(len(text))
    return text[:start] + chance.choice(("", chance.choice(ALPHABET))) + text[start + chance.randrange(3) :]


STRANGE: list[Any] = [
    *(
        None,
        0,
        1,
        -1,
        2**70,
        1.5,
        True,
        "",
        "x",
        ".*",
        "(",
        "*",
        "all-linear",
        "norms-and-biases",
        "layers",
        "\0",
        "größe",
    ),
    *([], [1], [0, 1], ["query"], ["weight"], ["(", None], [[]], {}, {"a": 1}, float("nan"), "(a+)+b", ["bias"] * 400),
]
"""What options that stand in JSON may be given."""

VALUES: dict[str, list[Any]] = {
    "said": [False, True],
    "add_bias": [False, True],
    "lambda_granularity": ["layer", "module", "tensor"],
    "projection": ["fastfood", "global", "dense"],
    "scale": ["fan_in", "isometric"],
    "head": ["subspace", "keep"],
    "task_type": [None, "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"],
}
"""What all others may be given."""


def grown(before: int) -> float:
    """MiB by which this process has outgrown `before`."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit


def tried(data: bytes | str, base: torch.nn.Module) -> tuple[str, str]:
    """What became of one case, and the message."""
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
            return f"refused when {stage}", str(error)
        return f"BAD {type(error).__name__} when {stage}", str(error)
    return "loaded", ""


def main() -> int:
    """Runs the cases and prints a line; 1 where there is a finding."""
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
            changed = mutated(changed, chance.choice(files)[0], chance) or b"PIA"
        if chance.random() < 0.8:
            changed = resealed(changed)
        if chance.random() < 0.1:
            changed = rewritten(PackedAdapter.from_bytes(whole), chance)
        data: bytes | str = changed
        if chance.random() < 0.15:
            data = mutated_text(adapter_to_string(chance.choice((whole, changed))), chance)
        clock = time.process_time()
        outcome, message = tried(data, base)
        seconds = time.process_time() - clock
        slowest, more = max(slowest, seconds), grown(before)
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
