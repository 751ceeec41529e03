"""The command distance."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME

from ..analysis.distance import parameter_distance, write_report
from .inputs import load_base, resolve_path


def distance(args: argparse.Namespace) -> None:
    """Print the distance between two models, or between a model and itself with an adapter."""
    base, tuned = resolve_path(args.base), resolve_path(args.tuned)
    pair: tuple[Any, Any] = base, tuned
    if Path(tuned, CONFIG_NAME).exists():
        config = PeftConfig.from_pretrained(tuned)
        model = load_base(base, config.task_type, args.labels or getattr(config, "num_labels", None))
        try:
            pair = model, PeftModel.from_pretrained(model, tuned)
        except (RuntimeError, ValueError) as error:  # sizes that differ, as PEFT or this package reports them
            raise ValueError(f"{error} For another number of labels: --labels.") from None
    result = parameter_distance(*pair, threshold=args.threshold, ignore_missing=args.ignore_missing)
    print(result.report())
    if args.out:
        write_report(result, args.out)
        print(f"distance.json, distance.md and distance.png in {args.out}")
