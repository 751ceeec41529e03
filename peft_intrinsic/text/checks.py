"""Checks of labeled data: the rows of a file with their lines, and up to ten errors in one message."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEPARATORS = {".csv": ",", ".tsv": "\t"}

TEXT_FILES = (*SEPARATORS, ".json", ".jsonl")
"""Suffixes of files whose lines an editor shows."""

SHOWN = 10
"""Number of errors in a message, and of lines for each."""

NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
WHOLE, CODE = re.compile(r"\s*[+-]?\d+\s*"), re.compile(r"\s*[+-]?0\d+\s*")
ENCODING = "not UTF-8: save the file in UTF-8"

Label = tuple[str, Any]
"""Type (text, number, bool) and value."""

Labels = dict[Label, list[int]]
"""Lines of each label."""


class Unreadable(str):
    """Replaces a row, and says why it cannot be read."""


Row = tuple[int, "dict[str, Any] | Unreadable"]
"""Line on which a row begins, or its index from 1 where there are no lines; and its columns."""


@dataclass
class Source:
    """Rows of one file, or of one split of a dataset."""

    path: str
    rows: Iterable[Row]
    names: list[str] = field(default_factory=list)  # of the columns; complete when the rows have been read
    position: str = "line"  # what the number of a row counts
    separator: str | None = None  # between cells, whose values are text
    kept: list[dict[str, Any]] | None = None  # the checked columns of all readable rows, if they are collected


def read_rows(path: str) -> Source:
    """Read the rows of a file that has one of the suffixes `TEXT_FILES`."""
    names: list[str] = []
    if separator := SEPARATORS.get(Path(path).suffix):
        return Source(path, _read_cells(path, separator, names), names, separator=separator, kept=[])
    return Source(path, _read_objects(path, names), names, kept=[])


def _read_cells(path: str, separator: str, names: list[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default is shorter than some texts
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        tabs = separator == "\t"  # TSV has no quotation marks
        reader = csv.reader(file, delimiter=separator, quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
        end = 0
        for cells in reader:
            start, end = end + 1, reader.line_num
            if len(cells) == 1 < len(names) and not cells[0].strip():
                continue  # a blank line
            if not names:
                names += cells
            elif cells and not _is_unicode("".join(cells)):
                yield start, Unreadable(ENCODING)
            elif cells and len(cells) != len(names):
                count = f"{len(cells)} cell{'s' * (len(cells) > 1)}"
                why = f"{count} separated by {separator!r}, but the header has {len(names)}"
                if end > start:
                    why += f"; the row ends on line {end}: close its quotation mark"
                elif len(cells) > len(names) and separator == ",":
                    why += ": put a cell with a comma in quotation marks"
                yield start, Unreadable(why)
            elif cells:
                yield start, {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _read_objects(path: str, names: list[str]) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        for line, value in _read_array(file.read()) if first.lstrip().startswith("[") else _read_lines(file):
            if isinstance(value, dict):
                names += [name for name in value if name not in names]
            elif not isinstance(value, Unreadable):
                value = Unreadable('no JSON object such as {"text": "a film", "label": "good"}')
            yield line, value


def _read_lines(file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(map(str.strip, file), 1):
        if not _is_unicode(text):
            yield line, Unreadable(ENCODING)
        elif text:
            value, end = _decode(text, 0)
            yield line, value if end >= len(text) else Unreadable("not valid JSON (more than one value)")


def _read_array(text: str) -> Iterator[tuple[int, Any]]:
    """Elements of one array that fills the file."""
    between = re.compile(r"[\s,]*")
    line, counted, start = 1, 0, text.index("[") + 1
    while (start := between.match(text, start).end()) < len(text) and text[start] != "]":  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, start), start
        value, start = _decode(text, start)
        yield line, value


def _decode(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at an index, and where it ends: after an error, at the end of the text."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except ValueError as error:
        return Unreadable(f"not valid JSON ({getattr(error, 'msg', error)})"), len(text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass
class Checks:
    """Checks of the data of a `Task`, whose errors are collected."""

    columns: Sequence[str]
    label: str | None
    task_type: str
    float_metric: str | None  # name of the metric if it needs numeric labels
    values: dict[str, Label] = field(default_factory=dict)  # of the labels in cells, by their text
    errors: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    examples: dict[tuple[str, str], Any] = field(default_factory=dict)

    def run(self, sources: Sequence[Source]) -> None:
        """Check the training and the evaluation data, which may be the same.

        Raises:
            ValueError: The data have errors; the message names up to ten.
        """
        read = {source.path: (source, self._check_rows(source)) for source in {s.path: s for s in sources}.values()}
        if self.label and not self.float_metric:
            cells = {text for source, labels in read.values() if source.separator for _, text in labels}
            self.values = _convert(cells)  # those of both files, so that both get the same type
            for source, labels in read.values():
                if source.separator:
                    read[source.path] = source, self._merge(labels)
            train, evaluation = (read[source.path] for source in sources)
            self._check_labels(*train, *evaluation)
        paths = [source.path for source in sources]

        def locate(key: tuple[str, str]) -> tuple[int, int]:
            file = next((i for i, path in enumerate(paths) if key[0].startswith(path)), len(paths))
            return file, min(self.errors[key], default=0)

        messages = [self._format(*key) for key in sorted(self.errors, key=locate)]
        if len(messages) > SHOWN:
            messages[SHOWN:] = [f"and {len(messages) - SHOWN} errors of other kinds"]
        if messages:
            several = "\n  ".join(["the data have several errors:", *messages])
            raise ValueError(several if len(messages) > 1 else messages[0])

    def columns_of(self, source: Source) -> dict[str, list[Any]]:
        """The columns of a source that keeps its rows, after `run`. Labels in cells are numbers or bools if all are."""
        rows = source.kept or []
        columns = {name: [row[name] for row in rows] for name in (*self.columns, *([self.label] if self.label else []))}
        if self.label and source.separator:
            cells = columns[self.label]
            columns[self.label] = [float(text) if self.float_metric else self.values[text][1] for text in cells]
        return columns

    def _merge(self, labels: Labels) -> Labels:
        merged: Labels = {}
        for (_, text), lines in labels.items():
            merged.setdefault(self.values[text], []).extend(lines)
        return merged

    def _add(self, source: Source | str, what: str, lines: Sequence[int] = (), example: Any = None) -> None:
        """Note an error on some lines of a file, with the first wrong value."""
        where = source if isinstance(source, str) else f"{source.path}, {source.position}" if lines else source.path
        self.errors.setdefault((where, what), []).extend(lines)
        if example is not None:
            self.examples.setdefault((where, what), example)

    def _format(self, where: str, what: str) -> str:
        lines = self.errors[where, what]
        more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        numbers = f"{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:SHOWN]))}{more}" if lines else ""
        example = f" ({self.examples[where, what]!r:.60})" if (where, what) in self.examples else ""
        return f"{where}{numbers}: {what}{example}."

    def _check_rows(self, source: Source) -> Labels:
        """Check every row of a source. Returns its labels; none where they are values to predict."""
        columns = [*self.columns, *([self.label] if self.label else [])]
        missing: dict[str, list[int]] = {column: [] for column in columns}
        numeric: dict[str, bool] = {}  # whether each cell of a text column holds a number
        labels: Labels = {}
        empty = True
        for line, row in source.rows:
            empty = False
            if isinstance(row, Unreadable):
                self._add(source, row, [line])
                continue
            if source.kept is not None:
                source.kept.append({column: row.get(column) for column in columns})
            for column in columns:
                if row.get(column) is None:
                    missing[column].append(line)
                elif column == self.label:
                    self._check_label(source, line, row, labels)
                else:
                    self._check_text(source, line, column, row[column], numeric)
        absent = [column for column in columns if column not in source.names]
        if absent and source.names:
            self._add(source, _explain_absent(source, columns, absent))
        elif empty:
            self._add(source, "it has no rows" if self.label is None else "it has no labeled rows")
        for column in columns:
            if column not in absent and missing[column]:
                self._add(source, f"no value in column {column!r}", missing[column])
            if numeric.get(column):
                self._add(source, f"column {column!r} is numeric, not text. Name the column of the text (--text)")
            if source.names.count(column) > 1:
                self._add(source, f"several columns are named {column!r}. Rename all but one")
        return labels

    def _check_text(self, source: Source, line: int, column: str, value: Any, numeric: dict[str, bool]) -> None:
        words = self.task_type == "TOKEN_CLS"
        if not (
            isinstance(value, list) and all(isinstance(word, str) for word in value)
            if words
            else isinstance(value, str)
        ):
            what = f"column {column!r} does not hold {'lists of words' if words else 'text'}"
            self._add(source, what, [line], value)
        elif isinstance(value, str) and source.separator:
            numeric[column] = numeric.get(column, True) and _is_number(value)

    def _check_label(self, source: Source, line: int, row: Mapping[str, Any], labels: Labels) -> None:
        value, words, wrong = row[str(self.label)], row.get(self.columns[0]), ""
        if self.task_type == "TOKEN_CLS":
            if not isinstance(value, list) or not isinstance(words, list) or len(value) != len(words):
                wrong = f"{self.columns[0]!r} and {self.label!r} are not lists of equal length, for TOKEN_CLS"
        elif isinstance(value, list | dict):
            wrong = f"column {self.label!r} does not hold one label per row. For one per word: --task-type TOKEN_CLS"
        elif self.float_metric and not (_is_number(value) if source.separator else _type(value) == "number"):
            wrong = f"column {self.label!r} does not hold a number, which metric={self.float_metric!r} (--metric) needs"
        each = value if isinstance(value, list) else [value]
        if not wrong and any(one is None or (isinstance(one, float) and not math.isfinite(one)) for one in each):
            wrong = f"column {self.label!r} holds no value, NaN or infinity"
        if wrong:
            self._add(source, wrong, [line], value)
        elif not self.float_metric:
            for one in each:
                labels.setdefault((_type(one), one), []).append(line)

    def _check_labels(self, train: Source, train_labels: Labels, evaluation: Source, labels: Labels) -> None:
        """Check that both sources have the same labels, each in one spelling."""
        first: dict[Label, str] = {}
        for source, lines_of in ((evaluation, labels), (train, train_labels)):
            first |= {label: f"{source.path}, {source.position} {lines[0]}" for label, lines in lines_of.items()}
        groups: dict[str, list[Label]] = {}
        for label in sorted(first, key=str):
            shown = _show(label).strip("'\" ").casefold()
            groups.setdefault(str(int(shown)) if shown.isdecimal() else shown, []).append(label)
        alike = [group for group in groups.values() if len(group) > 1]
        column = f"column {self.label!r}"
        for group in alike:
            spellings = {str(value).strip() for _, value in group}
            how = "type" if len({kind for kind, _ in group}) > 1 else "case" if len(spellings) > 1 else "spaces"
            if how == "case" and len({spelling.casefold() for spelling in spellings}) > 1:
                how = "leading zeros"
            names = " and ".join(f"{_show(label)} ({first[label]})" for label in group)
            self._add(column, f"labels {names} differ in {how} only. Write them alike")
        types = {label[0]: label for label in sorted(first, key=str)}
        if len(types) > 1 and not alike:
            names = ", ".join(f"{kind} ({_show(label)}; {first[label]})" for kind, label in types.items())
            self._add(column, f"it holds labels of several types: {names}. Write them alike")
        explained = {label for group in alike for label in group}
        sound = not any(where in (train.path, f"{train.path}, {train.position}") for where, _ in self.errors)
        for label, lines in labels.items():  # of a file with errors, labels may be missing for that alone
            if sound and train_labels and label not in train_labels and label not in explained:
                what = f"label {_show(label)} does not occur in {train.path}. Remove the rows"
                self._add(evaluation, what, lines)
        for source, lines_of in {train.path: (train, train_labels), evaluation.path: (evaluation, labels)}.values():
            if len(lines_of) == 1:
                name = _show(next(iter(lines_of)))
                self._add(source, f"every row has the same label, {name}. Two labels or more are needed")


def _explain_absent(source: Source, columns: Sequence[str], absent: Sequence[str]) -> str:
    names = ", ".join(map(repr, absent))
    if spaced := [name for name in source.names if name.strip() in absent]:
        return f"it has no column {names}, but {spaced}. Remove the spaces from its header"
    for other in ",;\t|" if source.separator else "":
        header = (source.separator or "").join(source.names).split(other)
        if set(columns) <= {name.strip() for name in header}:
            suffix = next((suffix for suffix, separator in SEPARATORS.items() if separator == other), None)
            remedy = f"Rename the file to {suffix}" if suffix else f"Save it with {source.separator!r}"
            why = f"its cells are separated by {other!r}, not {source.separator!r}"
            return f"it has no column {names}, since {why}. {remedy}"
    return f"it has no column {names} (--text, --label), only {source.names}"


def _is_number(text: str) -> bool:
    return NUMBER.fullmatch(text) is not None and math.isfinite(float(text))


def _type(value: Any) -> str:
    return "text" if isinstance(value, str) else "bool" if isinstance(value, bool) else "number"


def _convert(texts: Iterable[str]) -> dict[str, Label]:
    """Convert the text of cells to numbers or bools if all cells hold such. Codes such as 007 remain text."""
    texts = set(texts)
    if texts and all(map(_is_number, texts)):
        if any(CODE.fullmatch(text) for text in texts):
            return {text: ("text", text) for text in texts}
        whole = all(WHOLE.fullmatch(text) and abs(int(text)) < 2**63 for text in texts)
        return {text: ("number", int(text) if whole else float(text)) for text in texts}
    if set(map(str.lower, texts)) <= {"true", "false"}:
        return {text: ("bool", text.lower() == "true") for text in texts}
    return {text: ("text", text) for text in texts}


def _show(label: Label) -> str:
    _, value = label
    return repr(int(value) if isinstance(value, float) and value.is_integer() else value)
