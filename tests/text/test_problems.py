"""Errors in data files: each with its line, all in one message."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, load_dataset

from peft_intrinsic.text.problems import SHOWN
from peft_intrinsic.text.rows import file_rows
from peft_intrinsic.text.tasks import files


def message(train, held_out=None, columns=("text",), **more) -> str:
    with pytest.raises(ValueError, match=r"[\w.]+") as error:
        files(str(train), str(held_out or train), list(columns), **more)
    return str(error.value)


def written(path, content: str):
    path.write_bytes(content.encode("latin-1" if "latin" in path.name else "utf-8"))
    return path


CSV = 'text,label\n"a film\nof two lines",good\n\nbad film,bad\na, b and c,good\nfilm,\n'


def test_lines_of_a_csv_count_as_in_an_editor(tmp_path):
    """By hand: the header is line 1, a row of two lines begins on 2, a blank line is 4."""
    told = message(written(tmp_path / "a.csv", CSV))
    assert "a.csv, line 6: 3 cells separated by ',', but the header has 2: put a cell with a comma" in told
    assert "a.csv, line 7: no value in column 'label'." in told
    assert [line for line, _ in file_rows(str(tmp_path / "a.csv")).rows] == [2, 5, 6, 7]


def test_lines_of_json_count_as_in_an_editor(tmp_path):
    lines = (
        '\n{"text": "a", "label": 1}\n\n{"text": "b"}\n[1]\n{"text": "c", "label": 0\n"a"\n{"text": 1, "label": 0}\n'
    )
    told = message(written(tmp_path / "a.jsonl", lines))
    assert "a.jsonl, line 4: no value in column 'label'." in told
    assert "a.jsonl, lines 5, 7: no JSON object" in told
    assert "a.jsonl, line 6: not valid JSON" in told
    assert "a.jsonl, line 8: column 'text' does not hold text (1)." in told
    array = '[\n {"text": "a", "label": 1},\n\n {"text": "b",\n  "label": null},\n {"text": "c", "label": 0}]'
    assert message(written(tmp_path / "b.json", array)).endswith("b.json, line 4: no value in column 'label'.")


@pytest.mark.parametrize("content", [CSV, "text,label\r\na,1\r\n \r\nb,0\r\n", '\ufefftext,label\n"a ""b""",x\nc,y\n'])
def test_rows_are_those_that_the_reader_gives(content, tmp_path):
    """Against pandas through `datasets`, where no row has an error."""
    content = content.replace("a, b and c,good\nfilm,\n", "")
    path = str(written(tmp_path / "a.csv", content))
    read = load_dataset("csv", data_files=path, split="train")
    assert [{name: str(value) for name, value in row.items()} for row in read] == [
        row for _, row in file_rows(path).rows
    ]


def test_errors_of_all_kinds_and_of_both_files_are_one_message(tmp_path):
    train = written(tmp_path / "train.csv", "text,label\na,good\nb\nc,Good\nd,bad\ne,\n" + "f,\n" * 20)
    held_out = written(tmp_path / "dev.jsonl", '{"text": "a", "label": "fine"}\n{"text": null, "label": "bad"}\n')
    told = message(train, held_out)
    for part in (
        "train.csv, line 3: 1 cell separated by ','",
        "train.csv, lines 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 and 11 more: no value in column 'label'.",
        "dev.jsonl, line 2: no value in column 'text'.",
        f"labels 'Good' ({train}, line 4) and 'good' ({train}, line 2) differ in case only.",
        f"dev.jsonl, line 1: label 'fine' does not occur in {train}.",
    ):
        assert part in told
    assert told.count("\n") == 5


def test_at_most_ten_errors_are_listed(tmp_path):
    rows = "".join("a" + ",x" * (i + 2) + "\n" for i in range(SHOWN + 3))
    told = message(written(tmp_path / "a.csv", "text,label\na,x\nb,y\n" + rows)).splitlines()
    assert len(told) == SHOWN + 2
    assert told[-1].strip() == "and 3 errors of other kinds"


@pytest.mark.parametrize(
    ("labels", "how"),
    [
        (["good", "Good"], "case"),
        (["good", "good ", "bad"], "spaces"),
        ([1, "1", 0], "type"),
        ([True, "true", "no"], "type"),
        (["straße", "STRASSE"], "case"),
    ],
)
def test_labels_that_differ_in_one_respect_only_are_named(labels, how, tmp_path):
    lines = "\n".join(json.dumps({"text": "a film", "label": label}) for label in labels)
    told = message(written(tmp_path / "a.jsonl", lines))
    assert f"differ in {how} only" in told
    assert all(f"{label!r} ({tmp_path}/a.jsonl, line {i})" in told for i, label in enumerate(labels[:2], 1))


def test_labels_of_two_files_that_differ_in_type_only_are_named(tmp_path):
    train = written(tmp_path / "a.csv", "text,label\na,1\nb,0\n")
    held_out = written(tmp_path / "b.jsonl", '{"text": "a", "label": "1"}\n{"text": "a", "label": "0"}\n')
    told = message(train, held_out)
    assert f"labels 1 ({train}, line 2) and '1' ({held_out}, line 1) differ in type only" in told
    assert "does not occur" not in told


@pytest.mark.parametrize(
    ("name", "separator", "todo"),
    [("a.csv", ";", "Save it with ','"), ("a.csv", "\t", "Rename the file to .tsv"), ("a.tsv", ",", "to .csv")],
)
def test_another_separator_is_named(name, separator, todo, tmp_path):
    content = "text,label\na film,good\nb,bad\n".replace(",", separator)
    told = message(written(tmp_path / name, content))
    assert f"it has no column 'text', 'label', since its cells are separated by {separator!r}" in told
    assert told.endswith(f"{todo}.")
    assert "\n" not in told


def test_cells_beyond_the_header_are_not_taken_for_an_index(tmp_path):
    """Where every row has one cell more, pandas takes the first for an index, and every other for its neighbor."""
    told = message(written(tmp_path / "a.csv", "text,label\nfine, they say,1\nbad, they say,0\n"))
    assert "a.csv, lines 2, 3: 3 cells" in told


def test_lines_that_are_not_utf_8_are_named(tmp_path):
    told = message(written(tmp_path / "latin.csv", "text,label\na,x\ncafé,y\nb,y\n"))
    assert told.endswith("latin.csv, line 3: not UTF-8: save the file in UTF-8.")
    told = message(written(tmp_path / "latin.jsonl", '{"text": "a", "label": 1}\n{"text": "é", "label": 0}\n'))
    assert "latin.jsonl, line 2: not UTF-8" in told


def test_rows_of_parquet_count_from_one(tmp_path):
    Dataset.from_dict({"text": ["a", None, "b"], "label": [0, 1, 1]}).to_parquet(tmp_path / "a.parquet")
    assert message(tmp_path / "a.parquet").endswith("a.parquet, row 2: no value in column 'text'.")


@pytest.mark.parametrize("value", ["NaN", "1e999", "2.5"])
def test_labels_that_are_no_whole_numbers_are_named_as_they_are(value, tmp_path):
    lines = f'{{"text": "a", "label": 1}}\n{{"text": "b", "label": 0}}\n{{"text": "c", "label": {value}}}\n'
    held_out = written(tmp_path / "b.jsonl", lines)
    train = written(tmp_path / "a.jsonl", "\n".join(lines.splitlines()[:2]))
    assert f"b.jsonl, line 3: label {json.loads(value)!r} does not occur in" in message(train, held_out)
