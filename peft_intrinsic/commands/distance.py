"""The command distance."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from ..analysis.distance import parameter_distance, write_report
from .inputs import choose_labels, load_adapter, load_base, read_adapter_config, resolve_path


def distance(args: argparse.Namespace) -> None:
    """Print the distance between two models, or between a model and itself with an adapter."""
    base, tuned = resolve_path(args.base), resolve_path(args.tuned)
    pair: tuple[Any, Any] = base, tuned
    if Path(tuned, CONFIG_NAME).exists():
        config = read_adapter_config(tuned, (PeftConfig,))
        stored = getattr(config, "num_labels", None)
        model = load_base(base, config.task_type, choose_labels(args, stored), option="BASE")
        # Some adapters change their base: trained biases, PiSSA.
        pair = copy.deepcopy(model), load_adapter(args, model, tuned, stored)
    result = parameter_distance(*pair, threshold=args.threshold, ignore_missing=args.ignore_missing)
    print(result.report())
    if args.out:
        write_report(result, args.out)
        print(f"distance.json, distance.md and distance.png in {args.out}")
