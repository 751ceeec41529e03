"""Metrics of labels and predictions: four are built in, the library `evaluate` has the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from ..version import pip_install


@dataclass(frozen=True)
class Metric:
    """A score of predictions.

    Args:
        compute: Function of (labels, predictions, names of the classes, index of the positive one). Labels and
            predictions are floats, or indexes of classes; for words, a list per row.
        regression: Whether it compares floats, which makes the task a regression.
        rows: Whether it compares the words of each row, not all words at once.
    """

    compute: Callable[[Any, Any, Sequence[str], int], float]
    regression: bool = False
    rows: bool = False


def _f1(labels: np.ndarray, predictions: np.ndarray, names: Sequence[str], positive: int) -> float:
    # The mean over more than two classes, including those without a label or prediction.
    mean: dict[str, Any] = {"labels": range(len(names)), "average": "macro", "zero_division": 0}
    return f1_score(labels, predictions, **(mean if len(names) > 2 else {"pos_label": positive}))


def _spearman(labels: np.ndarray, predictions: np.ndarray, *_: Any) -> float:
    # A constant has no ranks.
    return 0.0 if len(set(predictions)) == 1 else spearmanr(labels, predictions).statistic


METRICS: dict[str, Metric] = {
    "accuracy": Metric(lambda labels, predictions, *_: accuracy_score(labels, predictions)),
    "f1": Metric(_f1),
    "matthews": Metric(lambda labels, predictions, *_: matthews_corrcoef(labels, predictions)),
    "spearman": Metric(_spearman, regression=True),
}
"""Built-in metrics. Higher is better, and correct predictions score 1."""


def split_name(name: str) -> tuple[str, str]:
    """Split `NAME:KEY` into name and key. The key is empty if there is none."""
    first, colon, key = name.rpartition(":")
    return (first, key) if colon and not Path(name).exists() else (name, "")


def find_script(name: str) -> Path | None:
    """Find the file of a metric that is a script or a folder, as `evaluate` does."""
    path = Path(split_name(name)[0])
    script = path if path.suffix == ".py" else path / f"{path.name}.py"
    return script.resolve() if name not in METRICS and script.is_file() else None


@cache
def load_metric(name: str) -> Metric:
    """Load a metric.

    Args:
        name: A key of `METRICS`; or a metric of `evaluate`, by its name on the Hub or the path of its script or folder.
            If it returns several scores, `NAME:KEY` selects one.

    Raises:
        ValueError: There is no such metric, or it compares something else than floats, classes, or lists of classes.
        ImportError: `evaluate` is not installed.
    """
    if name in METRICS:
        return METRICS[name]
    module, key = _load(name), split_name(name)[1]
    features = module.features
    try:
        predictions, _ = features["predictions"], features["references"]
        rows = hasattr(predictions, "feature")
        kind = (predictions.feature if rows else predictions).dtype
        if len(features) > 2 or (rows and kind.startswith("float")):
            raise TypeError
    except (AttributeError, KeyError, TypeError):
        raise ValueError(
            f"metric={name!r} (--metric) compares {features}, not floats, classes, or lists of classes."
        ) from None
    return Metric(partial(_compute, name, module, key, "string" in kind), kind.startswith("float"), rows)


def _load(name: str) -> Any:
    unknown = f"metric={name!r} (--metric) is unknown. Built in are {', '.join(METRICS)}; others are those of evaluate"
    try:
        import evaluate
    except ImportError as error:
        raise ImportError(f"{unknown}, but {error}: {pip_install('[measure]')}") from error
    try:
        return evaluate.load(split_name(name)[0], module_type="metric", keep_in_memory=True)
    except FileNotFoundError as error:
        hub = error.__context__
        # The Hub answers "Unauthorized" for a metric that it does not have.
        if isinstance(hub, ConnectionError) and "Unauthorized" not in str(hub):
            raise ValueError(f"{unknown}: no script of that name is here, and the Hub could not be reached.") from None
        raise ValueError(f"{unknown}: {error}") from None
    except Exception as error:  # a script may raise anything
        raise ValueError(f"metric={name!r} (--metric) cannot be loaded: {error!r}") from error


def _compute(
    name: str,
    module: Any,
    key: str,
    named: bool,
    labels: Any,
    predictions: Any,
    classes: Sequence[str],
    positive: int,
) -> float:
    indexes = list(range(len(classes)))
    if named:
        labels, predictions, indexes = (_name_classes(values, classes) for values in (labels, predictions, indexes))
    accepted = inspect.signature(module._compute).parameters
    more: dict[str, Any] = {}
    if "average" in accepted and len(classes) > 2:  # by default a metric of one class
        mean = {"labels": indexes, "average": "macro", "zero_division": 0}
        more = {option: value for option, value in mean.items() if option in accepted}
    elif "pos_label" in accepted and len(classes) == 2:
        more = {"pos_label": indexes[positive]}
    try:
        result = module.compute(predictions=predictions, references=labels, **more)
    except Exception as error:  # a script may raise anything
        raise ValueError(f"metric={name!r} (--metric) cannot score these data: {error!r}") from error
    scores = result if isinstance(result, dict) else {}
    scores = {part: value for part, value in scores.items() if isinstance(value, Real)}
    if key in scores or (not key and len(scores) == 1):
        return float(scores[key] if key else next(iter(scores.values())))
    if key or not scores:
        raise ValueError(f"metric={name!r} (--metric) returns no number {key!r}, but {result!r}.")
    raise ValueError(
        f"metric={name!r} (--metric) returns {', '.join(scores)}. Choose one, such as '{name}:{next(iter(scores))}'."
    )


def _name_classes(indexes: Any, classes: Sequence[str]) -> list[Any]:
    return [classes[i] if np.ndim(i) == 0 else _name_classes(i, classes) for i in indexes]
