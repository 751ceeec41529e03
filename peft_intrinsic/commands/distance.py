"""The command distance."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from ..analysis.distance import parameter_distance, write_report
from .inputs import load_base, local_path


def distance(args: argparse.Namespace) -> None:
    """Distances between two models, or between a model and itself with an adapter."""
    base, tuned = local_path(args.base), local_path(args.tuned)
    sides: tuple[Any, Any] = base, tuned
    if Path(tuned, "adapter_config.json").exists():
        config = PeftConfig.from_pretrained(tuned)
        model = load_base(base, config.task_type, args.labels or getattr(config, "num_labels", None))
        try:
            sides = model, PeftModel.from_pretrained(model, tuned)
        except (RuntimeError, ValueError) as error:  # PEFT's own, of sizes that differ, and ours
            raise ValueError(f"{error} For another number of labels: --labels.") from None
    found = parameter_distance(*sides, threshold=args.threshold, ignore_missing=args.ignore_missing)
    print(found.report())
    if args.out:
        write_report(found, args.out)
        print(f"distance.json, distance.md and distance.png in {args.out}")
