"""Distance and critical layers of full fine-tuning (Radiya-Dixit and Wang 2020), on the tasks of supermask.py.

    python benchmarks/closeness.py TASK [--data FOLDER] [--model FOLDER] [--apart]

Full fine-tuning uses the best learning rate of benchmarks/results/supermask/TASK. Results are written to
benchmarks/results/closeness/TASK:
    distance.json, .md, .png    distance from the base (`parameter_distance`)
    critical.json, .md, .png    critical layers by accuracy on the test examples (`critical_layers`)
    frozen.md, trials.jsonl     `frozen_sweep`, three seeds: the k most critical parts, pooler and head are trained
If critical.json exists, only missing trials of the sweep run. With --apart, another model (seed 1) is fine-tuned, parts
are ranked by one half of the test examples, and the sweep is scored on the other half, in TASK_apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from quality import minilm
from studies import Methods
from supermask import NAMES, TASKS, Supermasks, list_methods

from peft_intrinsic.analysis import critical_layers, frozen_sweep, parameter_distance
from peft_intrinsic.analysis.distance import write_report
from peft_intrinsic.tuner.names import block_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--apart", action="store_true", help="rank and score on different examples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seed = int(args.apart)
    out = Path(__file__).parent / "results" / "closeness" / (args.task + "_apart" * args.apart)
    results = Methods("supermask", list_methods, NAMES, ())
    study = Supermasks(results, args.task, args.model or minilm(), args.data, Path("runs"))
    rate, runner = results.rate(args.task, "full"), study.runner(args.task)
    inputs, labels = runner.parts[1]
    ranked, scored = [(inputs[i::2], labels[i::2]) for i in (0, 1)] if args.apart else [runner.parts[1]] * 2

    if not (out / "critical.json").exists():
        runner.parts[1], tuned = ranked, study.base(seed)
        base = copy.deepcopy(tuned)
        study.train(args.task, tuned, {rate: list(tuned.parameters())}, seed)
        write_report(parameter_distance(base, tuned), out)
        critical = critical_layers(base, tuned, lambda model: runner.score(model)["accuracy"])
        (out / "critical.md").write_text(critical.report() + "\n", encoding="utf-8")
        critical.plot(out / "critical.png")
        (out / "critical.json").write_text(json.dumps(critical.to_dict(), indent=1) + "\n", encoding="utf-8")
        print(critical.report(), flush=True)
    parts = json.loads((out / "critical.json").read_text(encoding="utf-8"))["parts"]
    order = [part for part in parts if part != "classifier"]
    runner.parts[1] = scored

    def fit(trained: list[str], seed: int) -> float:
        model = study.base(seed)
        for name, parameter in model.named_parameters():
            part = block_of(name) or name.partition(".")[0]
            parameter.requires_grad_(part in trained or "pooler" in name or part == "classifier")
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return study.train(args.task, model, {rate: parameters}, seed)["accuracy"]

    scores = frozen_sweep(fit, order, out, counts=sorted({0, 1, 2, 4, len(order)}))
    lines = ["| k | trained besides pooler and head | accuracy | seeds |", "|---|---|---|---|"]
    for k, each in scores.items():
        lines.append(f"| {k} | {', '.join(order[:k]) or 'nothing'} | {sum(each) / len(each):.4f} | {len(each)} |")
    (out / "frozen.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
