"""Errors in data files: one message names them all, each with its line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_dataset

from peft_intrinsic.text.checks import SHOWN, read_rows
from peft_intrinsic.text.tasks import load_files


def read_error(train, held_out=None, columns=("text",), **more) -> str:
    with pytest.raises(ValueError, match=r"[\w.]+") as error:
        load_files(str(train), str(held_out or train), list(columns), **more)
    return str(error.value)


def write_bytes(path, content: str):
    path.write_bytes(content.encode("latin-1" if "latin" in path.name else "utf-8"))
    return path


CSV = 'text,label\n"a film\nof two lines",good\n\nbad film,bad\na, b and c,good\nfilm,\n'


def test_csv_errors_name_lines_as_an_editor_counts_them(tmp_path):
    """The header is line 1, a row of two lines begins on line 2, and line 4 is blank."""
    text = read_error(write_bytes(tmp_path / "a.csv", CSV))
    assert "a.csv, line 6: 3 cells separated by ',', but the header has 2: put a cell with a comma" in text
    assert "a.csv, line 7: no value in column 'label'." in text
    assert [line for line, _ in read_rows(str(tmp_path / "a.csv")).rows] == [2, 5, 6, 7]


def test_json_errors_name_lines_as_an_editor_counts_them(tmp_path):
    lines = (
        '\n{"text": "a", "label": 1}\n\n{"text": "b"}\n[1]\n{"text": "c", "label": 0\n"a"\n{"text": 1, "label": 0}\n'
    )
    text = read_error(write_bytes(tmp_path / "a.jsonl", lines))
    assert "a.jsonl, line 4: no value in column 'label'." in text
    assert "a.jsonl, lines 5, 7: no JSON object" in text
    assert "a.jsonl, line 6: not valid JSON" in text
    assert "a.jsonl, line 8: column 'text' does not hold text (1)." in text
    array = '[\n {"text": "a", "label": 1},\n\n {"text": "b",\n  "label": null},\n {"text": "c", "label": 0}]'
    assert read_error(write_bytes(tmp_path / "b.json", array)).endswith("b.json, line 4: no value in column 'label'.")


@pytest.mark.parametrize("content", [CSV, "text,label\r\na,1\r\n \r\nb,0\r\n", '\ufefftext,label\n"a ""b""",x\nc,y\n'])
def test_rows_equal_those_of_pandas(content, tmp_path):
    """`datasets` reads CSV with pandas. No row has an error here."""
    content = content.replace("a, b and c,good\nfilm,\n", "")
    path = str(write_bytes(tmp_path / "a.csv", content))
    read = load_dataset("csv", data_files=path, split="train")
    assert [{name: str(value) for name, value in row.items()} for row in read] == [
        row for _, row in read_rows(path).rows
    ]


def test_one_message_names_all_errors_of_both_files(tmp_path):
    train = write_bytes(tmp_path / "train.csv", "text,label\na,good\nb\nc,Good\nd,bad\ne,\n" + "f,\n" * 20)
    held_out = write_bytes(tmp_path / "dev.jsonl", '{"text": "a", "label": "fine"}\n{"text": null, "label": "bad"}\n')
    text = read_error(train, held_out)
    for part in (
        "train.csv, line 3: 1 cell separated by ','",
        "train.csv, lines 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 and 11 more: no value in column 'label'.",
        "dev.jsonl, line 2: no value in column 'text'.",
        f"labels 'Good' ({train}, line 4) and 'good' ({train}, line 2) differ in case only.",
    ):
        assert part in text
    assert text.count("\n") == 4


def test_errors_are_in_the_order_of_lines_and_none_follows_from_those_of_the_training_file(tmp_path):
    """A row that cannot be read holds the label 'bad'."""
    train = write_bytes(tmp_path / "train.csv", "text,label\na,\nb,good,x\nc,bad,x,y\nd,\ne,good\nf,fine\n")
    held_out = write_bytes(tmp_path / "dev.csv", "text,label\na,bad\nb,good\n,fine\n")
    lines = read_error(train, held_out).splitlines()[1:]
    assert [line.partition(":")[0].rpartition("/")[2] for line in lines] == [
        *("train.csv, lines 2, 5", "train.csv, line 3", "train.csv, line 4", "dev.csv, line 4")
    ]
    write_bytes(train, "text,label\na,good\nb,fine\n")
    assert "dev.csv, line 2: label 'bad' does not occur in" in read_error(train, held_out)


def test_a_file_that_does_not_exist_is_reported_with_its_option(tmp_path):
    file = write_bytes(tmp_path / "a.csv", CSV)
    assert read_error("missing.csv", file) == "--train missing.csv: there is no such file."
    assert read_error(file, "missing.parquet") == "--eval missing.parquet: there is no such file."
    assert read_error("missing.csv") == "--train, --eval missing.csv: there is no such file."


def test_at_most_ten_errors_are_listed(tmp_path):
    rows = "".join("a" + ",x" * (i + 2) + "\n" for i in range(SHOWN + 3))
    text = read_error(write_bytes(tmp_path / "a.csv", "text,label\na,x\nb,y\n" + rows)).splitlines()
    assert len(text) == SHOWN + 2
    assert text[-1].strip() == "and 3 errors of other kinds"


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
def test_labels_that_differ_in_one_respect_raise(labels, how, tmp_path):
    lines = "\n".join(json.dumps({"text": "a film", "label": label}) for label in labels)
    text = read_error(write_bytes(tmp_path / "a.jsonl", lines))
    assert f"differ in {how} only" in text
    assert all(f"{label!r} ({tmp_path}/a.jsonl, line {i})" in text for i, label in enumerate(labels[:2], 1))


def test_labels_of_two_files_that_differ_in_type_raise(tmp_path):
    train = write_bytes(tmp_path / "a.csv", "text,label\na,1\nb,0\n")
    held_out = write_bytes(tmp_path / "b.jsonl", '{"text": "a", "label": "1"}\n{"text": "a", "label": "0"}\n')
    text = read_error(train, held_out)
    assert f"labels 1 ({train}, line 2) and '1' ({held_out}, line 1) differ in type only" in text
    assert "does not occur" not in text


@pytest.mark.parametrize(
    ("name", "separator", "todo"),
    [("a.csv", ";", "Save it with ','"), ("a.csv", "\t", "Rename the file to .tsv"), ("a.tsv", ",", "to .csv")],
)
def test_error_names_the_separator_that_the_file_has(name, separator, todo, tmp_path):
    content = "text,label\na film,good\nb,bad\n".replace(",", separator)
    text = read_error(write_bytes(tmp_path / name, content))
    assert f"it has no column 'text', 'label', since its cells are separated by {separator!r}" in text
    assert text.endswith(f"{todo}.")
    assert "\n" not in text


def test_cells_beyond_the_header_raise(tmp_path):
    """If every row has an extra cell, pandas reads the first as an index and shifts the others."""
    text = read_error(write_bytes(tmp_path / "a.csv", "text,label\nfine, they say,1\nbad, they say,0\n"))
    assert "a.csv, lines 2, 3: 3 cells" in text


def test_lines_that_are_not_utf_8_raise(tmp_path):
    text = read_error(write_bytes(tmp_path / "latin.csv", "text,label\na,x\ncafé,y\nb,y\n"))
    assert text.endswith("latin.csv, line 3: not UTF-8: save the file in UTF-8.")
    text = read_error(write_bytes(tmp_path / "latin.jsonl", '{"text": "a", "label": 1}\n{"text": "é", "label": 0}\n'))
    assert "latin.jsonl, line 2: not UTF-8" in text


def test_parquet_errors_count_rows_from_one(tmp_path):
    Dataset.from_dict({"text": ["a", None, "b"], "label": [0, 1, 1]}).to_parquet(tmp_path / "a.parquet")
    assert read_error(tmp_path / "a.parquet").endswith("a.parquet, row 2: no value in column 'text'.")


def test_error_shows_a_label_that_is_no_integer_as_it_is(tmp_path):
    lines = '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n{"text": "c", "label": 2.5}\n'
    held_out = write_bytes(tmp_path / "b.jsonl", lines)
    train = write_bytes(tmp_path / "a.jsonl", "\n".join(lines.splitlines()[:2]))
    assert "b.jsonl, line 3: label 2.5 does not occur in" in read_error(train, held_out)


@pytest.mark.parametrize("metric", [None, "spearman"])
@pytest.mark.parametrize("value", ["NaN", "1e999"])
def test_a_label_that_is_not_finite_is_an_error(value, metric, tmp_path):
    rows = [f'{{"text": "a", "label": {label}}}\n' for label in (1, 0, value)]
    assert "line 3: column 'label' holds no value, NaN or infinity" in read_error(
        write_bytes(tmp_path / "a.jsonl", "".join(rows)), metric=metric
    )


def labels(first: Path, second: Path, **more) -> list:
    task = load_files(str(first), str(second), ["text"], **more)
    assert type(task.labels("train")[0]) is type(task.labels("eval")[0])
    return task.classes


@pytest.mark.parametrize(
    ("train", "held_out", "classes"),
    [
        ("1 2 3 other", "1 2 3", ["1", "2", "3", "other"]),
        ("true false unknown", "true false", ["false", "true", "unknown"]),
        ("10 2 1", "2 10", [1, 2, 10]),
        ("01 02 10", "01 02", ["01", "02", "10"]),
        (
            "90071992547409931 90071992547409932",
            "90071992547409931 90071992547409932",
            [90071992547409931, 90071992547409932],
        ),
        ("1 2.5", "2.5 1", [1.0, 2.5]),
    ],
)
def test_labels_in_cells_have_one_type_in_both_files(train, held_out, classes, tmp_path):
    paths = [
        write_bytes(tmp_path / name, "text,label\n" + "".join(f"a film,{label}\n" for label in given.split()))
        for name, given in (("a.csv", train), ("b.csv", held_out))
    ]
    assert labels(*paths) == classes


def test_a_late_row_of_another_type_is_read(tmp_path):
    """pandas infers the type of 10,000 rows at a time."""
    lines = [f"a film,{i % 3}\n" for i in range(12_000)] + ["a film,other\n"]
    path = write_bytes(tmp_path / "a.csv", "text,label\n" + "".join(lines))
    assert labels(path, path) == ["0", "1", "2", "other"]
    path = write_bytes(tmp_path / "b.csv", "text,label\n" + "".join(lines[:-1]) + "a film,0.5\n")
    assert load_files(str(path), str(path), ["text"], metric="spearman").labels("train")[-1] == 0.5


def test_the_named_file_is_read_as_it_is_now(tmp_path):
    """Not another that its name matches as a pattern, nor an earlier state with the same time stamp."""
    for name, text in (("a[1].csv", "right"), ("a1.csv", "wrong")):
        write_bytes(tmp_path / name, f"text,label\n{text},0\n{text},1\n")
    path = tmp_path / "a[1].csv"
    assert load_files(str(path), str(path), ["text"]).data["train"]["text"][0] == "right"
    write_bytes(path, "text,label\nother,0\nother,1\n")
    os.utime(path, (0, 0))
    assert load_files(str(path), str(path), ["text"]).data["train"]["text"][0] == "other"
    write_bytes(path, "text,label\nagain,0\nagain,1\n")
    os.utime(path, (0, 0))
    assert load_files(str(path), str(path), ["text"]).data["train"]["text"][0] == "again"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("text,label,label\na,0,1\nb,1,0\n", "several columns are named 'label'. Rename all but one"),
        ("text, label\na,0\nb,1\n", "no column 'label', but [' label']. Remove the spaces from its header"),
        ("text,label\na,01\nb,1\nc,2\n", "differ in leading zeros only. Write them alike"),
    ],
)
def test_headers_and_codes_that_are_ambiguous_are_errors(contents, message, tmp_path):
    assert message in read_error(write_bytes(tmp_path / "a.csv", contents))


def test_a_word_without_a_value_is_an_error(tmp_path):
    path = write_bytes(tmp_path / "a.jsonl", '{"words": ["a", null], "tags": ["x", "y"]}\n')
    message = read_error(path, columns=["words"], label="tags", task_type="TOKEN_CLS")
    assert "column 'words' does not hold lists of words" in message


def test_classes_that_two_datasets_number_differently_are_an_error(tmp_path):
    for name, classes in (("a", ["neg", "neu", "pos"]), ("b", ["neg", "pos"])):
        features = Features({"text": Value("string"), "label": ClassLabel(names=classes)})
        rows = {"text": ["a film"] * len(classes), "label": list(range(len(classes)))}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    message = read_error(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert "the classes are ['neg', 'neu', 'pos'] in" in message
    assert "a number means different classes" in message
