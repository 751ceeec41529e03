"""Fine-tuning by zeroing weights, full fine-tuning and a frozen encoder (Radiya-Dixit and Wang 2020) compared.

    python benchmarks/supermask.py run TASK [--data FOLDER] [--model FOLDER] [--only NAME]...
    python benchmarks/supermask.py table TASK
    python benchmarks/supermask.py plot TASK

Tasks and protocol are those of benchmarks/quality.py (sst2, mrpc_250; all-MiniLM-L6-v2). A run appends one JSON line to
benchmarks/results/supermask/TASK/trials.jsonl, and runs that are there are skipped.

full: all parameters are trained. freeze: only pooler and head are. All others train these at the best learning rate of
freeze, and a mask on the linear layers of the encoder. `magnitude 0.03` starts with the smallest 3 % of the weights of
each layer at zero, `random 0.03` with a random 3 %. `bernoulli` samples the mask in each step. `start 0.03` is
magnitude 0.03 with a frozen mask. `lora 1` has a LoRA of rank 1 on the same layers instead of a mask. Each method
starts with three learning rates a factor of 4 apart, and gets more while the best by loss is at an edge; then two more
seeds run. `sparsity` is that of the trained mask of the first seed, and `bytes` is its size in the file, or that of the
LoRA in float32.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from quality import Row
from studies import FULL_RATES, Method, Methods, Study

from peft_intrinsic import SupermaskConfig

TASKS = ("sst2", "mrpc_250")
LINEAR = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
RATES = (5e-5, 2e-4, 8e-4)
NAMES = {
    "full": "full fine-tuning",
    "freeze": "pooler and head alone",
    "magnitude 0.03": "mask, starts without the smallest 3 %",
    "random 0.03": "mask, starts without a random 3 %",
    "magnitude 0.1": "mask, starts without the smallest 10 %",
    "random 0.1": "mask, starts without a random 10 %",
    "magnitude 0.3": "mask, starts without the smallest 30 %",
    "random 0.3": "mask, starts without a random 30 %",
    "magnitude 0.01": "mask, starts without the smallest 1 %",
    "random 0.01": "mask, starts without a random 1 %",
    "bernoulli 0.03": "sampled mask, the smallest 3 %",
    "start 0.03": "frozen mask without the smallest 3 %",
    "lora 1": "LoRA, r = 1",
    "lora 8": "LoRA, r = 8",
}


def list_methods(task: str, results: Methods) -> dict[str, Method]:
    """List the methods: their runs, and the learning rates that they start with."""
    base: Row = {"task": task, "seed": 0}
    result: dict[str, Method] = {
        "full": ({**base, "method": "full"}, FULL_RATES),
        "freeze": ({**base, "method": "freeze"}, (4e-4, 1.6e-3, 6.4e-3)),
    }
    if not (frozen := results.best(task, result["freeze"])):
        return result  # the others need its best learning rate
    for name in list(NAMES)[2:]:
        kind, size = name.split()
        own = {"rank": int(size)} if kind == "lora" else {"share": float(size)}
        result[name] = {**base, "method": kind, **own, "rest_lr": frozen[0]["lr"]}, RATES
    return result


class Supermasks(Study):
    """The study on one task."""

    def run(self, row: Row) -> Row:
        """Train and score one run of a method."""
        method, lr, seed = row["method"], row["lr"], row["seed"]
        model = self.base(seed)
        if method in ("full", "freeze"):
            parameters = self.only(model, ("",) if method == "full" else ("pooler", "classifier"))
            count = sum(p.numel() for p in parameters)
            return {"numbers": count, **self.train(self.task, model, {lr: parameters}, seed)}
        where: Any = {"target_modules": LINEAR, "modules_to_save": ["classifier", "bert.pooler"]}
        config = (
            LoraConfig(r=row["rank"], lora_alpha=2 * row["rank"], task_type="SEQ_CLS", **where)
            if method == "lora"
            else SupermaskConfig(
                initial_sparsity=row["share"],
                init="random" if method == "random" else "magnitude",
                mask="bernoulli" if method == "bernoulli" else "threshold",
                seed=seed,
                **where,
            )
        )
        model = get_peft_model(model, config)
        groups: dict[float, list] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rate = row["rest_lr"] if "modules_to_save" in name else 0.0 if method == "start" else lr
                groups.setdefault(rate, []).append(parameter)
        result = self.train(self.task, model, groups, seed)
        if method != "lora":
            result["sparsity"] = round(model.base_model.sparsity()["all"], 4)
        state = get_peft_model_state_dict(model)
        own = [value for key, value in state.items() if key.endswith("supermask_mask") or ".lora_" in key]
        return {**result, "bytes": sum(value.numel() * value.element_size() for value in own)}


if __name__ == "__main__":
    Methods("supermask", list_methods, NAMES, ("sparsity", "bytes")).main(Supermasks, __doc__, TASKS)
