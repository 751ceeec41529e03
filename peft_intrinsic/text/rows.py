"""Rows of data files, each with the line on which it begins."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEPARATORS = {".csv": ",", ".tsv": "\t"}

LINES = (*SEPARATORS, ".json", ".jsonl")
"""Endings of files that an editor shows."""


class Unreadable(str):
    """Stands for a row, and says why it cannot be read."""


Row = tuple[int, "dict[str, Any] | Unreadable"]
"""The line on which a row begins, or its place where there are no lines, counted from 1; and its columns."""


@dataclass
class Source:
    """Rows of one file, or of one split of a dataset.

    Args:
        path: name of the file or split.
        rows: in order.
        names: of the columns; complete when the rows have been read.
        unit: what the numbers of the rows count.
        separator: of the cells, whose values are all text then.
    """

    path: str
    rows: Iterable[Row]
    names: list[str] = field(default_factory=list)
    unit: str = "line"
    separator: str | None = None


def file_rows(path: str) -> Source:
    """The rows of a file that has one of the endings `LINES`."""
    names: list[str] = []
    if separator := SEPARATORS.get(Path(path).suffix):
        return Source(path, _cells(path, separator, names), names, separator=separator)
    return Source(path, _objects(path, names), names)


def _cells(path: str, separator: str, names: list[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default ends within a long text
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        tabs = separator == "\t"  # which are not quoted
        reader = csv.reader(file, delimiter=separator, quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
        end = 0
        for cells in reader:
            start, end = end + 1, reader.line_num
            if len(cells) == 1 < len(names) and not cells[0].strip():
                continue  # a blank line
            if not names:
                names += cells
            elif cells and not _is_unicode("".join(cells)):
                yield start, Unreadable("not UTF-8: save the file in UTF-8")
            elif cells and len(cells) != len(names):
                many = f"{len(cells)} cell{'s' * (len(cells) > 1)}"
                why = f"{many} separated by {separator!r}, but the header has {len(names)}"
                if end > start:
                    why += f"; the row ends on line {end}: close its quotation mark"
                elif len(cells) > len(names) and separator == ",":
                    why += ": put a cell with a comma in quotation marks"
                yield start, Unreadable(why)
            elif cells:
                yield start, {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _objects(path: str, names: list[str]) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        for line, value in _array(file.read()) if first.lstrip().startswith("[") else _lines(file):
            if isinstance(value, dict):
                names += [name for name in value if name not in names]
            elif not isinstance(value, Unreadable):
                value = Unreadable('no JSON object such as {"text": "a film", "label": "good"}')
            yield line, value


def _lines(file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(file, 1):
        if not _is_unicode(text):
            yield line, Unreadable("not UTF-8: save the file in UTF-8")
        elif text.strip():
            value, end = _value(text.strip(), 0)
            yield line, value if end >= len(text.strip()) else Unreadable("not valid JSON (more than one value)")


def _array(text: str) -> Iterator[tuple[int, Any]]:
    """Elements of one array over the whole file."""
    between = re.compile(r"[\s,]*")
    line, counted, place = 1, 0, text.index("[") + 1
    while (place := between.match(text, place).end()) < len(text) and text[place] != "]":  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, place), place
        value, place = _value(text, place)
        yield line, value


def _value(text: str, place: int) -> tuple[Any, int]:
    """The JSON value at a place, and where it ends; nothing is read after an error."""
    try:
        return json.JSONDecoder().raw_decode(text, place)
    except ValueError as error:
        return Unreadable(f"not valid JSON ({getattr(error, 'msg', error)})"), len(text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
