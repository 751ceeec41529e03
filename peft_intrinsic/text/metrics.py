"""Scores of labels and answers: four are built in, `evaluate` has the others."""

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
    """A number for labels and answers.

    Args:
        compute: of (labels, answers, classes). Both are numbers, or indexes into the classes; of words, a list per row.
        numbers: it is of numbers, so what is learnt is a regression.
        rows: it is of the words of each row, not of all words.
    """

    compute: Callable[[Any, Any, Sequence[Any]], float]
    numbers: bool = False
    rows: bool = False


def _f1(labels: np.ndarray, answers: np.ndarray, classes: Sequence[Any]) -> float:
    # Of more than two classes the mean, also over those that do not occur here.
    more = {"labels": range(len(classes)), "average": "macro", "zero_division": 0} if len(classes) > 2 else {}
    return f1_score(labels, answers, **more)


def _spearman(labels: np.ndarray, answers: np.ndarray, _: Sequence[Any]) -> float:
    # A constant ranks nothing.
    return 0.0 if len(set(answers)) == 1 else spearmanr(labels, answers).statistic


METRICS: dict[str, Metric] = {
    "accuracy": Metric(lambda labels, answers, _: accuracy_score(labels, answers)),
    "f1": Metric(_f1),
    "matthews": Metric(lambda labels, answers, _: matthews_corrcoef(labels, answers)),
    "spearman": Metric(_spearman, numbers=True),
}
"""Built in: more is better, and right answers score 1."""


def parts(name: str) -> tuple[str, str]:
    """`NAME:KEY` as place and key; the key is empty where there is none."""
    place, colon, key = name.rpartition(":")
    return (place, key) if colon and not Path(name).exists() else (name, "")


def script(name: str) -> Path | None:
    """The file of a metric that is one, or its folder's, as `evaluate` finds it."""
    place = Path(parts(name)[0])
    found = place if place.suffix == ".py" else place / f"{place.name}.py"
    return found.resolve() if name not in METRICS and found.is_file() else None


@cache
def load_metric(name: str) -> Metric:
    """A metric by its name.

    Args:
        name: a key of `METRICS`; or a metric of `evaluate`, by its name on the Hub, or by the path of its script or
            folder. Where it gives several numbers, `NAME:KEY` chooses one.

    Raises:
        ValueError: there is none, or it compares something else than numbers, classes, or lists of classes.
        ImportError: `evaluate` is missing.
    """
    if name in METRICS:
        return METRICS[name]
    module, key = _load(name), parts(name)[1]
    asked = module.features
    try:
        answers, _ = asked["predictions"], asked["references"]
        rows = hasattr(answers, "feature")
        kind = (answers.feature if rows else answers).dtype
        if len(asked) > 2 or (rows and kind.startswith("float")):
            raise TypeError
    except (AttributeError, KeyError, TypeError):
        raise ValueError(
            f"metric={name!r} (--metric) compares {asked}, not numbers, classes, or lists of classes."
        ) from None
    return Metric(partial(_compute, name, module, key, "string" in kind), kind.startswith("float"), rows)


def _load(name: str) -> Any:
    unknown = f"metric={name!r} (--metric) is unknown. Built in are {', '.join(METRICS)}; others are those of evaluate"
    try:
        import evaluate
    except ImportError as error:
        raise ImportError(f"{unknown}, but {error}: {pip_install('[measure]')}") from error
    try:
        return evaluate.load(parts(name)[0], module_type="metric", keep_in_memory=True)
    except FileNotFoundError as error:
        hub = error.__context__
        # Of what the Hub does not have, it says that we are not allowed to see it.
        if isinstance(hub, ConnectionError) and "Unauthorized" not in str(hub):
            raise ValueError(f"{unknown}: no script of that name is here, and the Hub could not be reached.") from None
        raise ValueError(f"{unknown}: {error}") from None
    except Exception as error:  # whatever a script raises
        raise ValueError(f"metric={name!r} (--metric) cannot be loaded: {error!r}") from error


def _compute(name: str, module: Any, key: str, names: bool, labels: Any, answers: Any, classes: Sequence[Any]) -> float:
    everywhere = list(range(len(classes)))
    if names:
        labels, answers, everywhere = (_named(found, classes) for found in (labels, answers, everywhere))
    accepted = inspect.signature(module._compute).parameters
    more: dict[str, Any] = {}
    if "average" in accepted and len(classes) > 2:  # it is of one class, unless told
        offered = {"labels": everywhere, "average": "macro", "zero_division": 0}
        more = {option: value for option, value in offered.items() if option in accepted}
    try:
        found = module.compute(predictions=answers, references=labels, **more)
    except Exception as error:  # whatever a script raises
        raise ValueError(f"metric={name!r} (--metric) cannot score these data: {error!r}") from error
    given = found if isinstance(found, dict) else {}
    numbers = {part: value for part, value in given.items() if isinstance(value, Real)}
    if key in numbers or (not key and len(numbers) == 1):
        return float(numbers[key] if key else next(iter(numbers.values())))
    if key or not numbers:
        raise ValueError(f"metric={name!r} (--metric): no number {key!r} in what it gives, {found!r}.")
    raise ValueError(
        f"metric={name!r} (--metric) gives {', '.join(numbers)}. Choose one, such as '{name}:{next(iter(numbers))}'."
    )


def _named(found: Any, classes: Sequence[Any]) -> list[Any]:
    return [str(classes[one]) if np.ndim(one) == 0 else _named(one, classes) for one in found]
