"""Peak memory of merging and unmerging, relative to the size of the merged weights.

    python benchmarks/merging.py

Loads SmolLM2-135M (see examples/carriers.py) in a new process for each dtype. Prints the peak resident memory from
`merge_adapter()` to `unmerge_adapter()` above that before, as a multiple of the size of the merged weights.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_intrinsic import IntrinsicConfig

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from carriers import smollm2


def read_resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak:
    """Context manager that samples the peak resident memory every millisecond."""

    def __enter__(self) -> Peak:
        self.bytes, self._running = read_resident(), True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._running:
            self.bytes = max(self.bytes, read_resident())
            time.sleep(0.001)

    def __exit__(self, *exception: object) -> None:
        self._running = False
        self._thread.join()


def measure(dtype: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(**smollm2(), dtype=getattr(torch, dtype))
    model = get_peft_model(base, IntrinsicConfig(d=200, target_modules="all", init_weights=False))
    parameters = {p.data_ptr(): p for n, p in model.named_parameters() if "intrinsic_" not in n}
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    for parameter in parameters.values():
        parameter.data.copy_(parameter.data.clone())  # bring every page of the weights into memory
    gc.collect()
    before = read_resident()
    with Peak() as peak:
        model.merge_adapter()
        model.unmerge_adapter()
    print(f"{dtype:9} weights {size / 2**20:.0f} MiB, peak above the model {(peak.bytes - before) / size:.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dtype:
        measure(args.dtype)
        return
    for dtype in ("float32", "bfloat16"):
        subprocess.run([sys.executable, "-W", "ignore", __file__, "--dtype", dtype], check=True)


if __name__ == "__main__":
    main()
