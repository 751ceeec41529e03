"""The folder of a run: one line per finished trial, so that a killed run goes on where it stopped."""

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
TRIALS, SETTINGS, DAMAGED = "trials.jsonl", "settings.json", "damaged.jsonl"
PLAN = "plan.json"
LOST = "so it is not known what its trials mean"
REPORTS = "report.json", "report.md", "curve.csv", "curve.png", "curve.svg", "curve.pdf"


def hash_configuration(configuration: Mapping[str, Any]) -> str:
    """Hash a configuration to 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:16]


def write_whole(path: Path, contents: str | bytes) -> None:
    """Replace a file at once: whoever reads it, or resumes after a crash, finds the old contents or the new."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    os.replace(temporary, path)


def read_json(path: Path, lost: str) -> dict[str, Any]:
    """A mapping that a run keeps.

    Args:
        path: of the file.
        lost: what is not known without it.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}), {lost}. Put back a copy, use another folder, or overwrite this "
            "one: overwrite=True (--overwrite)."
        ) from None


def check_folder(folder: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """Whether a folder is free, or of a run with these settings; nothing is locked or written.

    Raises:
        ValueError: it is of another run, or damaged; the message names what differs.
    """
    path = Path(folder, SETTINGS)
    if not path.exists():
        return
    found, settings = read_json(path, LOST), json.loads(json.dumps(settings))
    unlike = [name for name in sorted({*found, *settings}) if found.get(name) != settings.get(name)]
    if unlike:
        told = ", ".join(f"{name}: {found.get(name)!r} there, {settings.get(name)!r} now" for name in unlike)
        raise ValueError(
            f"{folder} was written by a run with other settings ({told}). Use another folder, or overwrite this "
            "one: overwrite=True (--overwrite)."
        )


def _sum(row: Mapping[str, Any]) -> str:
    """A checksum of a row."""
    return hash_configuration({name: value for name, value in row.items() if name != "sum"})[:8]


def _row(line: bytes) -> dict[str, Any] | None:
    """A row of the file; None if it is damaged. Rows of earlier versions have no checksum."""
    try:
        row = json.loads(line.decode("utf-8"))
        sound = isinstance(row["key"], str) and row.pop("sum", None) in (None, _sum(row))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return row if sound else None


class Store:
    """Finished trials of one run, in memory and on disk.

    Args:
        folder: made if missing.
        settings: what all trials of the run have in common. A folder written by others is refused. None takes those of
            a folder that is there.
        overwrite: discard the stored trials of a folder that is in use.
        names: of what a configuration has, where all rows count: those of other settings are then set aside.

    Raises:
        ValueError: the folder belongs to other settings, which the message names, or its files contradict themselves.
        RuntimeError: another process is using the folder.
        OSError: it cannot be written.
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
            raise RuntimeError(
                f"{self.folder} is in use by another run. Wait for it, or choose another folder."
            ) from None
        try:
            if overwrite:
                for name in (TRIALS, SETTINGS, DAMAGED, PLAN, *REPORTS):
                    (self.folder / name).unlink(missing_ok=True)
            self.settings = self._checked(json.loads(json.dumps(settings)))
            self.rows = self._read()
        except BaseException:
            self._lock.release()
            raise

    def _checked(self, settings: dict[str, Any] | None) -> dict[str, Any]:
        path = self.folder / SETTINGS
        if settings is not None and not path.exists():
            if (self.folder / TRIALS).exists():
                raise ValueError(f"{self.folder} holds trials but no settings. Use another folder, or overwrite=True.")
            write_whole(path, json.dumps(settings, indent=1, sort_keys=True))
            return settings
        if settings is None:
            return read_json(path, LOST)
        check_folder(self.folder, settings)
        return settings

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.folder / TRIALS
        raw = path.read_bytes() if path.exists() else b""
        rows: dict[str, dict[str, Any]] = {}
        sound, aside = [], []
        for number, line in enumerate(raw.splitlines(), 1):
            row = _row(line)
            known = row and rows.get(row["key"])
            if row is None or self._foreign(row):
                aside.append(line + b"\n")
                what = "is damaged" if row is None else "is of a run with other settings"
                warnings.warn(f"{path}, line {number}, {what}: set aside in {DAMAGED}.", stacklevel=4)
                continue
            if known and known != row:
                raise ValueError(
                    f"{path}, line {number}, is another result of a trial that stands there already (key "
                    f"{row['key']}). Delete the wrong one of the two lines."
                )
            rows[row["key"]] = row
            sound.append(line + b"\n")
        if aside:
            with (self.folder / DAMAGED).open("ab") as file:
                file.writelines(aside)
        if aside or raw[-1:] not in (b"", b"\n"):
            write_whole(path, b"".join(sound))
        return rows

    def _foreign(self, row: Mapping[str, Any]) -> bool:
        return bool(self.names) and row["key"] != self.key({name: row.get(name) for name in self.names})

    def add(self, configuration: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Note a finished trial, on disk before it counts."""
        row = {"key": self.key(configuration), **configuration, **result}
        line = (json.dumps({**row, "sum": _sum(row)}) + "\n").encode()
        descriptor = os.open(self.folder / TRIALS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            whole = os.fstat(descriptor).st_size
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, whole)
                raise OSError(errno.ENOSPC, "no room for the row of a finished trial", str(self.folder / TRIALS))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.rows[row["key"]] = row

    def key(self, configuration: Mapping[str, Any]) -> str:
        """Of all that a trial depends on, the run's settings included: a row copied from another run does not count."""
        return hash_configuration({**self.settings, **configuration})

    def close(self) -> None:
        """Let other runs use the folder."""
        self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
