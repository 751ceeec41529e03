"""Fine-tuning by zeroing weights beside full fine-tuning and the frozen encoder (Radiya-Dixit and Wang 2020).

    python benchmarks/supermask.py run TASK [--data FOLDER] [--model FOLDER] [--only NAME]...
    python benchmarks/supermask.py table TASK
    python benchmarks/supermask.py plot TASK

Tasks and protocol are those of benchmarks/quality.py (sst2, mrpc_250; all-MiniLM-L6-v2). A run appends one JSON line to
benchmarks/results/supermask/TASK/trials.jsonl, and runs that are there are skipped.

full: everything trained. freeze: pooler and head. All others train these at freeze's best rate, and a mask over the
linear layers of the encoder: `magnitude 0.03` begins with the smallest 3 % of the weights of each layer at zero,
`random 0.03` with any 3 %; `bernoulli` draws the mask anew in each step. `start 0.03` is magnitude 0.03 with a mask
that does not move. Rates of each start with three a factor of 4 apart, with more while the best, by loss, is at an
edge; then two more seeds. `sparsity` is that of the trained mask of the first seed, `bytes` its size in the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from peft import get_peft_model, get_peft_model_state_dict
from quality import Row
from studies import FULL_RATES, Contestants, Method, Study

from peft_intrinsic import SupermaskConfig

TASKS = ("sst2", "mrpc_250")
LINEAR = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
RATES = (5e-5, 2e-4, 8e-4)
NAMES = (
    *("full", "freeze", "magnitude 0.03", "random 0.03", "magnitude 0.1", "random 0.1", "magnitude 0.3", "random 0.3"),
    *("magnitude 0.01", "random 0.01", "bernoulli 0.03", "start 0.03"),
)


def contestants(task: str, results: Contestants) -> dict[str, Method]:
    """Every contestant: its run, and the rates that it starts with."""
    base: Row = {"task": task, "seed": 0}
    result: dict[str, Method] = {
        "full": ({**base, "method": "full"}, FULL_RATES),
        "freeze": ({**base, "method": "freeze"}, (4e-4, 1.6e-3, 6.4e-3)),
    }
    if not (frozen := results.best(task, result["freeze"])):
        return result  # the others need its best rate
    for name in NAMES[2:]:
        kind, share = name.split()
        run = {**base, "method": kind, "share": float(share), "rest_lr": frozen[0]["lr"]}
        result[name] = run, RATES
    return result


class Supermasks(Study):
    """One task of the study."""

    def run(self, row: Row) -> Row:
        """One run of a contestant."""
        method, lr, seed = row["method"], row["lr"], row["seed"]
        model = self.base(seed)
        if method in ("full", "freeze"):
            parameters = self.only(model, ("",) if method == "full" else ("pooler", "classifier"))
            numbers = sum(p.numel() for p in parameters)
            return {"numbers": numbers, **self.train(self.task, model, {lr: parameters}, seed)}
        config = SupermaskConfig(
            target_modules=LINEAR,
            modules_to_save=["classifier", "bert.pooler"],
            initial_sparsity=row["share"],
            init="random" if method == "random" else "magnitude",
            mask="bernoulli" if method == "bernoulli" else "threshold",
            seed=seed,
        )
        model = get_peft_model(model, config)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rates: dict[float, list] = {}
        for name, parameter in trained.items():
            rate = row["rest_lr"] if "supermask" not in name else 0.0 if method == "start" else lr
            rates.setdefault(rate, []).append(parameter)
        measured = self.train(self.task, model, rates, seed)
        masks = [value for key, value in get_peft_model_state_dict(model).items() if key.endswith("supermask_mask")]
        sparsity = round(model.base_model.sparsity()["all"], 4)
        return {**measured, "sparsity": sparsity, "bytes": sum(mask.numel() for mask in masks)}


if __name__ == "__main__":
    Contestants("supermask", contestants, NAMES, ("sparsity", "bytes")).main(Supermasks, __doc__, TASKS)
