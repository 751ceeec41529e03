"""The folder of a run: a row per finished trial, so that an interrupted run resumes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

TRIAL = "d", "seed", "learning_rate"
TRIALS, SETTINGS, DAMAGED, PLAN = "trials.jsonl", "settings.json", "damaged.jsonl", "plan.json"
REPORTS = "report.json", "report.md", "curve.csv", "curve.png", "curve.svg", "curve.pdf"
REMEDY = "Use another folder, or delete this one. measure and the like overwrite it with overwrite=True (--overwrite)."


def hash_configuration(configuration: Mapping[str, Any]) -> str:
    """Hash a configuration to 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:16]


def write_whole(path: Path, contents: str | bytes) -> None:
    """Replace a file atomically: a reader finds the old contents or the new, also after a crash."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    os.replace(temporary, path)


def read_json(path: Path, lost: str) -> dict[str, Any]:
    """Read a mapping from a file of a run.

    Raises:
        ValueError: The file is damaged; the message says what is `lost`.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}), {lost}. Put back a copy. {REMEDY}") from None


def _read_settings(path: Path) -> dict[str, Any]:
    return read_json(path, "so the settings of its trials are unknown")


def check_folder(folder: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """Check whether a run with these settings may use a folder. Locks and writes nothing.

    Raises:
        ValueError: The folder belongs to a run with other settings, which the message names, or is damaged.
    """
    path = Path(folder, SETTINGS)
    if not path.exists():
        return
    stored, settings = _read_settings(path), json.loads(json.dumps(settings))
    names = [name for name in sorted({*stored, *settings}) if stored.get(name) != settings.get(name)]
    if names:
        pairs = ", ".join(f"{name}: {stored.get(name)!r} there, {settings.get(name)!r} now" for name in names)
        raise ValueError(f"{folder} was written by a run with other settings ({pairs}). {REMEDY}")


def _compute_checksum(row: Mapping[str, Any]) -> str:
    return hash_configuration({name: value for name, value in row.items() if name != "sum"})[:8]


def _parse(line: bytes) -> dict[str, Any] | None:
    """Parse a row of the file; None if it is damaged. Rows of earlier versions have no checksum."""
    try:
        row = json.loads(line.decode("utf-8"))
        valid = isinstance(row["key"], str) and row.pop("sum", None) in (None, _compute_checksum(row))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return row if valid else None


class Store:
    """Rows of the finished trials of one run, in memory and on disk. The folder is locked until `close`.

    Args:
        folder: Folder of the run; created if missing.
        settings: What all trials of the run have in common; None takes those of an existing folder.
        overwrite: Discard the stored trials of a folder that is in use.
        names: Names in a configuration. If given, rows of other settings are set aside.

    Raises:
        ValueError: The folder belongs to other settings, which the message names, or its files contradict each other.
        RuntimeError: Another process is using the folder.
        OSError: The folder cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: Mapping[str, Any] | None,
        overwrite: bool = False,
        names: Sequence[str] = (),
    ) -> None:
        self.folder, self.names = Path(folder), names
        if settings is None and not (self.folder / SETTINGS).exists():
            raise ValueError(f"{self.folder} is not the folder of a run: it has no {SETTINGS}.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(f"{self.folder} is in use by another run. Wait for it, or use another folder.") from None
        try:
            if overwrite:
                for name in (TRIALS, SETTINGS, DAMAGED, PLAN, *REPORTS):
                    (self.folder / name).unlink(missing_ok=True)
            self.settings = self._load_settings(json.loads(json.dumps(settings)))
            self.rows = self._load_rows()
        except BaseException:
            self._lock.release()
            raise

    def _load_settings(self, settings: dict[str, Any] | None) -> dict[str, Any]:
        path = self.folder / SETTINGS
        if settings is None:
            return _read_settings(path)
        if path.exists():
            check_folder(self.folder, settings)
        elif (self.folder / TRIALS).exists():
            raise ValueError(f"{self.folder} holds trials but no settings. {REMEDY}")
        else:
            write_whole(path, json.dumps(settings, indent=1, sort_keys=True))
        return settings

    def _load_rows(self) -> dict[str, dict[str, Any]]:
        path = self.folder / TRIALS
        raw = path.read_bytes() if path.exists() else b""
        rows: dict[str, dict[str, Any]] = {}
        valid, aside = [], []
        for number, line in enumerate(raw.splitlines(), 1):
            row = _parse(line)
            if row is None or self._is_of_other_settings(row):
                aside.append(line + b"\n")
                what = "is damaged" if row is None else "belongs to a run with other settings"
                warnings.warn(f"{path}, line {number}, {what}: set aside in {DAMAGED}.", stacklevel=4)
                continue
            if rows.setdefault(row["key"], row) != row:
                raise ValueError(
                    f"{path}, line {number}, is another result of a stored trial (key {row['key']}). Delete the wrong "
                    "one of the two lines."
                )
            valid.append(line + b"\n")
        if aside:
            with (self.folder / DAMAGED).open("ab") as file:
                file.writelines(aside)
        if aside or raw[-1:] not in (b"", b"\n"):
            write_whole(path, b"".join(valid))
        return rows

    def _is_of_other_settings(self, row: Mapping[str, Any]) -> bool:
        return bool(self.names) and row["key"] != self.key({name: row.get(name) for name in self.names})

    def add(self, configuration: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Store the row of a finished trial, first on disk.

        Raises:
            OSError: The disk is full. No part of the row is left.
        """
        row = {"key": self.key(configuration), **configuration, **result}
        line = (json.dumps({**row, "sum": _compute_checksum(row)}) + "\n").encode()
        descriptor = os.open(self.folder / TRIALS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, "no room for the row of a finished trial", str(self.folder / TRIALS))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.rows[row["key"]] = row

    def key(self, configuration: Mapping[str, Any]) -> str:
        """Hash what a trial depends on, the settings of the run included. Rows copied from other runs thus differ."""
        return hash_configuration({**self.settings, **configuration})

    def close(self) -> None:
        """Release the folder."""
        self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
