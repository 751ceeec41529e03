"""Files of a run that were damaged or edited."""

from __future__ import annotations

import json

import pytest

from peft_intrinsic.trials.store import DAMAGED, Store, hash_configuration


def filled(folder) -> list[bytes]:
    with Store(folder, {"model": "x"}) as store:
        for d in (10, 20, 30):
            store.add({"d": d, "seed": 0}, {"score": d / 100, "seconds": 0.1})
    return (folder / "trials.jsonl").read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace(b"0.2,", b"0.9,"),  # a score
        lambda line: line.replace(b'"d": 20', b'"d": 21'),
        lambda line: line[: len(line) // 2] + b"\n",
        lambda line: b"\xff\xfe\n",
        lambda line: b"[]\n",
        lambda line: b"{}\n",
    ],
)
def test_damaged_row_is_set_aside_and_can_be_added_again(tmp_path, damage):
    lines = filled(tmp_path)
    bad = damage(lines[1])
    (tmp_path / "trials.jsonl").write_bytes(lines[0] + bad + lines[2])
    with pytest.warns(UserWarning, match=r"trials\.jsonl, line 2, is damaged: set aside in damaged\.jsonl"):
        store = Store(tmp_path, {"model": "x"})
    with store:
        assert sorted(row["d"] for row in store.rows.values()) == [10, 30]
        store.add({"d": 20, "seed": 0}, {"score": 0.2, "seconds": 0.2})
    assert (tmp_path / DAMAGED).read_bytes() == bad
    with Store(tmp_path, {"model": "x"}) as store:
        assert sorted(row["score"] for row in store.rows.values()) == [0.1, 0.2, 0.3]
        assert all("sum" not in row for row in store.rows.values())


def test_last_row_without_a_line_break_counts_if_complete(tmp_path):
    """An editor may drop it; a killed process leaves half a row."""
    lines, path = filled(tmp_path), tmp_path / "trials.jsonl"
    path.write_bytes(b"".join(lines)[:-1])
    with Store(tmp_path, {"model": "x"}) as store:
        assert len(store.rows) == 3
    assert path.read_bytes() == b"".join(lines)
    path.write_bytes(b"".join(lines)[:-20])
    with pytest.warns(UserWarning, match="line 3, is damaged"), Store(tmp_path, {"model": "x"}) as store:
        assert len(store.rows) == 2
    assert path.read_bytes() == b"".join(lines[:2])
    assert (tmp_path / DAMAGED).read_bytes() == lines[2][:-20] + b"\n"


def test_rows_of_earlier_versions_without_a_checksum_count(tmp_path):
    lines = [json.loads(line) for line in filled(tmp_path)]
    for line in lines:
        assert line.pop("sum")
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Store(tmp_path, {"model": "x"}) as store:
        assert len(store.rows) == 3


def test_two_results_of_one_trial_raise(tmp_path):
    lines = filled(tmp_path)
    (tmp_path / "trials.jsonl").write_bytes(b"".join([*lines, lines[0]]))
    with Store(tmp_path, {"model": "x"}) as store:
        assert len(store.rows) == 3  # the same line twice
    other = json.loads(lines[0])
    del other["sum"]
    other["score"] = 0.7
    (tmp_path / "trials.jsonl").write_bytes(b"".join([*lines, json.dumps(other).encode() + b"\n"]))
    before = (tmp_path / "trials.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"line 4, is another result of a stored trial .*Delete the wrong one"):
        Store(tmp_path, {"model": "x"})
    assert (tmp_path / "trials.jsonl").read_bytes() == before


@pytest.mark.parametrize("text", ["{", "[1, 2]", ""])
def test_damaged_settings_raise_unless_overwritten(tmp_path, text):
    filled(tmp_path)
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"settings\.json is damaged .*Put back a copy"):
        Store(tmp_path, {"model": "x"})
    with Store(tmp_path, {"model": "x"}, overwrite=True) as store:
        assert store.rows == {}
    assert hash_configuration({"b": 1, "a": 2}) == hash_configuration({"a": 2, "b": 1})
