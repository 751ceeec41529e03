"""Stores of adapters: what is found by a name, and names that could reach something else."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import huggingface_hub
import pytest
from helpers.hub import COMMIT, serve_hub

from peft_intrinsic.serving import open_store

HOSTILE = [
    "../ann",
    "a/b",
    "/etc/passwd",
    "..",
    ".hidden",
    "-x",
    "",
    "a\0b",
    "a\n",
    "x" * 129,
    "ann; DROP TABLE adapters",
]


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "store"
    (root / "bob").mkdir(parents=True)
    (root / "bob" / "adapter_config.json").write_text("{}")
    (root / "ann.pia").write_bytes(b"PIA1")
    (tmp_path / "secret.pia").write_bytes(b"secret")
    return root


@pytest.fixture
def database(tmp_path) -> Path:
    path = tmp_path / "adapters.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE adapters (name VARCHAR(128) PRIMARY KEY, data BLOB NOT NULL)")
        connection.executemany("INSERT INTO adapters VALUES (?, ?)", [("bob", b"PIA2"), ("ann", b"PIA1")])
    return path


def test_a_folder_has_packed_files_and_saved_adapters(folder):
    store = open_store(str(folder))
    assert store.get("ann") == b"PIA1"
    assert store.get("bob") == folder.resolve() / "bob"
    assert store.get("carl") is None
    (folder / "carl.safetensors").write_bytes(b"theta")
    assert store.get("carl") == b"theta"
    assert list(store.names()) == ["ann", "bob", "carl"]


def test_a_database_is_read_as_it_is_now(database):
    pytest.importorskip("sqlalchemy")
    store = open_store(f"sqlite:///{database}")
    assert store.get("ann") == b"PIA1"
    assert list(store.names()) == ["ann", "bob"]
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE adapters SET data = ? WHERE name = 'ann'", (b"PIA3",))
        connection.execute("DELETE FROM adapters WHERE name = 'bob'")
    assert store.get("ann") == b"PIA3"
    assert store.get("bob") is None


def test_the_hub_is_read_as_it_is_now(monkeypatch, tmp_path):
    """Nothing comes from the cache after an adapter was removed, or while the Hub fails."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    state = {"commit": COMMIT, "status": 200}

    def answer(self) -> None:
        if "/resolve/" in self.path:
            data = state["commit"].encode()
            return self.answer(data, ETag=f'"{state["commit"]}"', X_Repo_Commit=state["commit"])
        if state["status"] != 200:
            code = "RepoNotFound" if state["status"] == 404 else "none"
            return self.answer({"error": "no"}, state["status"], X_Error_Code=code)
        if "/tree/" in self.path:
            file = {"type": "file", "path": "adapter_config.json", "size": len(COMMIT), "oid": state["commit"]}
            return self.answer(json.dumps([file]).encode())
        files = [{"rfilename": "adapter_config.json"}]
        return self.answer({"id": "someone/ann", "sha": state["commit"], "siblings": files})

    def read(store) -> str:
        return (store.get("ann") / "adapter_config.json").read_text()

    store = open_store("hub:someone")
    with serve_hub(monkeypatch) as hub:
        monkeypatch.setattr(hub, "do_GET", answer)
        monkeypatch.setattr(hub, "do_HEAD", answer)
        assert read(store) == COMMIT
        state["commit"] = "1" * 40
        assert read(store) == "1" * 40
        state["status"] = 404
        assert store.get("ann") is None
        assert store.get("a@b") is None  # no name on the Hub
        state["status"] = 500
        with pytest.raises(ConnectionError, match=r"someone/ann .*500"):
            store.get("ann")
    with pytest.raises(ConnectionError, match=r"someone/ann .*offline"):
        store.get("ann")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_raise(folder, database, name):
    pytest.importorskip("sqlalchemy")
    for url in (str(folder), f"sqlite:///{database}", "hub:someone"):
        with pytest.raises(ValueError, match="no name of an adapter"):
            open_store(url).get(name)
    with sqlite3.connect(database) as connection:
        connection.execute("INSERT INTO adapters VALUES (?, ?)", (name, b"PIA3"))
    assert list(open_store(f"sqlite:///{database}").names()) == ["ann", "bob"]


def test_links_out_of_a_folder_raise(folder):
    for name in ("eve.pia", "fay.safetensors", "guy"):
        (folder / name).symlink_to(folder.parent / "secret.pia")
        with pytest.raises(ValueError, match="a link to a path outside the store"):
            open_store(str(folder)).get(name.partition(".")[0])


def test_stores_that_do_not_exist_raise(tmp_path):
    pytest.importorskip("sqlalchemy")
    with pytest.raises(ValueError, match="is no folder"):
        open_store(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"has no table 'adapters' .* CREATE TABLE adapters"):
        open_store(f"sqlite:///{tmp_path / 'empty.db'}")
    with pytest.raises(ValueError, match="cannot be opened"):
        open_store("nothing://host/db")
