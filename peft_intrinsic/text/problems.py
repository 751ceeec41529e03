"""What is wrong with labelled data: all errors at once, with file and line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .rows import SEPARATORS, Source, Unreadable

SHOWN = 10
"""Errors in a message, and lines of each."""

NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")

Label = tuple[str, Any]
"""Its kind (text, number, bool) and value."""

Labels = dict[Label, list[int]]
"""The lines of each label."""


class Problems:
    """Errors in data, collected so that one message names them all."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[int]] = {}
        self.examples: dict[tuple[str, str], Any] = {}

    def add(self, source: Source | str, what: str, lines: Sequence[int] = (), example: Any = None) -> None:
        """Note an error of a file, on some of its lines, with the first wrong value."""
        path, unit = (source, "") if isinstance(source, str) else (source.path, source.unit if lines else "")
        key = (f"{path}, {unit}" if unit else path, what)
        self.found.setdefault(key, []).extend(lines)
        if example is not None:
            self.examples.setdefault(key, example)

    def check(self) -> None:
        """Report them.

        Raises:
            ValueError: there are some.
        """
        told = [self._told(*key) for key in self.found]
        if len(told) > SHOWN:
            told[SHOWN:] = [f"and {len(told) - SHOWN} errors of other kinds"]
        if told:
            raise ValueError(told[0] if len(told) == 1 else "\n  ".join(["the data have several errors:", *told]))

    def _told(self, where: str, what: str) -> str:
        lines = self.found[where, what]
        more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        some = f"{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:SHOWN]))}{more}" if lines else ""
        example = f" ({self.examples[where, what]!r:.60})" if (where, what) in self.examples else ""
        return f"{where}{some}: {what}{example}."


@dataclass
class Checks:
    """Checks of a task's data.

    Args:
        columns, label, task_type: see `Task`.
        numbers: the metric, where it needs numbers as labels.
    """

    columns: Sequence[str]
    label: str | None
    task_type: str
    numbers: str | None
    problems: Problems = field(default_factory=Problems)

    def run(self, sources: Sequence[Source]) -> None:
        """Check the data of training and evaluation, which may be the same.

        Raises:
            ValueError: an error, or up to ten.
        """
        found = {source.path: (source, self.rows(source)) for source in {one.path: one for one in sources}.values()}
        train, evaluated = (found[source.path] for source in sources)
        if self.label and not self.numbers:
            self.labels(*train, *evaluated)
        self.problems.check()

    def rows(self, source: Source) -> Labels:
        """Check every row of a source; its labels, or none where they are numbers to predict."""
        kept = [*self.columns, *([self.label] if self.label else [])]
        missing: dict[str, list[int]] = {column: [] for column in kept}
        numeric: dict[str, bool] = {}  # of columns of text, whether each cell holds a number
        labels: Labels = {}
        empty = True
        for line, row in source.rows:
            empty = False
            if isinstance(row, Unreadable):
                self.problems.add(source, row, [line])
                continue
            for column in kept:
                if row.get(column) is None:
                    missing[column].append(line)
                elif column == self.label:
                    self._label(source, line, row, labels)
                else:
                    self._text(source, line, column, row[column], numeric)
        absent = [column for column in kept if column not in source.names]
        if absent and source.names:
            self.problems.add(source, _absent(source, kept, absent))
        elif empty:
            self.problems.add(source, "it has no rows" if self.label is None else "it has no labelled rows")
        for column in kept:
            if column not in absent and missing[column]:
                self.problems.add(source, f"no value in column {column!r}", missing[column])
            if numeric.get(column):
                what = f"column {column!r} holds numbers, not text. Name the column of the text (--text)"
                self.problems.add(source, what)
        return _typed(labels) if source.separator else labels

    def _text(self, source: Source, line: int, column: str, value: Any, numeric: dict[str, bool]) -> None:
        words = self.task_type == "TOKEN_CLS"
        if not isinstance(value, list if words else str):
            what = f"column {column!r} does not hold {'lists of words' if words else 'text'}"
            self.problems.add(source, what, [line], value)
        elif isinstance(value, str) and source.separator:
            numeric[column] = numeric.get(column, True) and _number(value)

    def _label(self, source: Source, line: int, row: Mapping[str, Any], labels: Labels) -> None:
        value, words, wrong = row[str(self.label)], row.get(self.columns[0]), ""
        if self.task_type == "TOKEN_CLS":
            if not isinstance(value, list) or not isinstance(words, list) or len(value) != len(words):
                wrong = f"{self.columns[0]!r} and {self.label!r} are not lists of equal length, for TOKEN_CLS"
        elif isinstance(value, list | dict):
            wrong = f"column {self.label!r} does not hold one label per row. For one per word: --task-type TOKEN_CLS"
        elif self.numbers and not (_number(value) if source.separator else _kind(value) == "number"):
            wrong = f"column {self.label!r} does not hold a number, which metric={self.numbers!r} (--metric) needs"
        if wrong:
            self.problems.add(source, wrong, [line], value)
        elif not self.numbers:
            for one in value if isinstance(value, list) else [value]:
                labels.setdefault((_kind(one), one), []).append(line)

    def labels(self, train: Source, known: Labels, evaluated: Source, asked: Labels) -> None:
        """Check that both sources have the same labels, and write each in one way."""
        first: dict[Label, str] = {}
        for source, labels in ((evaluated, asked), (train, known)):
            first |= {key: f"{source.path}, {source.unit} {lines[0]}" for key, lines in labels.items()}
        groups: dict[str, list[Label]] = {}
        for key in sorted(first, key=str):
            groups.setdefault(_shown(key).strip("'\" ").casefold(), []).append(key)
        alike = [group for group in groups.values() if len(group) > 1]
        column = f"column {self.label!r}"
        for group in alike:
            plain = {str(value).strip() for _, value in group}
            how = "type" if len({kind for kind, _ in group}) > 1 else "case" if len(plain) > 1 else "spaces"
            told = " and ".join(f"{_shown(key)} ({first[key]})" for key in group)
            self.problems.add(column, f"labels {told} differ in {how} only. Write them alike")
        kinds = {key[0]: key for key in sorted(first, key=str)}
        if len(kinds) > 1 and not alike:
            told = ", ".join(f"{kind} ({_shown(key)}; {first[key]})" for kind, key in kinds.items())
            self.problems.add(column, f"it holds labels of several types: {told}. Write them alike")
        explained = {key for group in alike for key in group}
        for key, lines in asked.items():
            if known and key not in known and key not in explained:
                what = f"label {_shown(key)} does not occur in {train.path}. Leave the rows out"
                self.problems.add(evaluated, what, lines)
        for source, labels in {train.path: (train, known), evaluated.path: (evaluated, asked)}.values():
            if len(labels) == 1:
                told = _shown(next(iter(labels)))
                self.problems.add(source, f"every row has the same label, {told}: nothing can be measured on it")


def _absent(source: Source, kept: Sequence[str], absent: Sequence[str]) -> str:
    told = ", ".join(map(repr, absent))
    for other in ",;\t|" if source.separator else "":
        names = (source.separator or "").join(source.names).split(other)
        if set(kept) <= {name.strip() for name in names}:
            ending = next((ending for ending, separator in SEPARATORS.items() if separator == other), None)
            todo = f"Rename the file to {ending}" if ending else f"Save it with {source.separator!r}"
            return (
                f"it has no column {told}, since its cells are separated by {other!r}, not {source.separator!r}. {todo}"
            )
    return f"it has no column {told} (--text, --label), only {source.names}"


def _number(text: str) -> bool:
    return NUMBER.fullmatch(text) is not None


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "bool" if isinstance(value, bool) else "number"


def _typed(labels: Labels) -> Labels:
    """Labels of cells, as their reader takes them: numbers where all are, or bools."""
    texts = [text for _, text in labels]
    found: Labels = {}
    for (kind, text), lines in labels.items():
        value = text
        if all(map(_number, texts)):
            kind, value = "number", float(text)
        elif {one.lower() for one in texts} <= {"true", "false"}:
            kind, value = "bool", text.lower() == "true"
        found.setdefault((kind, value), []).extend(lines)
    return found


def _shown(key: Label) -> str:
    _, value = key
    return repr(int(value) if isinstance(value, float) and value.is_integer() else value)
