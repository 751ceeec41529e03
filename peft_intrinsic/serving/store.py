"""Stores of adapters by name: a folder, a table of a database, or an organization on the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ..version import pip_install

NAME = re.compile(r"[A-Za-z0-9_@][A-Za-z0-9._@-]{0,127}")
"""Names of adapters: no paths, no hidden files."""

SUFFIXES = (".pia", ".safetensors")
"""Suffixes of files in a folder: packed adapters, and θ in safetensors."""

MAX_BYTES = 2**26
"""Largest file or row that a store returns: 64 MiB."""

Stored = bytes | Path
"""A packed adapter, or θ in safetensors with its configuration (`read_saved`); or the folder of a saved adapter."""


class AdapterStore(Protocol):
    """Adapters by name."""

    def get(self, name: str) -> Stored | None:
        """Return the adapter of this name as it is stored now, or None if there is none.

        Raises:
            ValueError: the name is no name of an adapter.
            ConnectionError: the Hub cannot be read.
        """

    def names(self) -> Iterator[str]:
        """Iterate over the names that `get` takes, in the order of code points."""


def check_name(name: str) -> None:
    """Raise ValueError if a name could be anything but the name of an adapter, such as a path."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name[:200]!r} is no name of an adapter. Use up to 128 letters, digits and the signs . _ @ -, and begin "
            "with none of the signs . and -."
        )


class FolderStore:
    """Packed adapters `NAME.pia`, θ in safetensors `NAME.safetensors`, and saved adapters in folders `NAME`.

    Args:
        folder: the folder that contains them.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"The store {str(folder)!r} is no folder. Create it, or pass the URL of a database.")
        self.folder = folder.resolve()

    def get(self, name: str) -> Stored | None:
        check_name(name)
        files, folder = [self.folder / f"{name}{suffix}" for suffix in SUFFIXES], self.folder / name
        for path in (*files, folder):
            if path.exists() and not path.resolve().is_relative_to(self.folder):
                raise ValueError(f"{name!r} is a link to a path outside the store. Copy the adapter into it.")
        for file in files:
            if file.is_file():
                if (size := file.stat().st_size) > MAX_BYTES:
                    raise ValueError(f"{name!r} has {size} bytes, more than the {MAX_BYTES} of an adapter.")
                return file.read_bytes()
        return folder if (folder / "adapter_config.json").is_file() else None

    def names(self) -> Iterator[str]:
        files = (path.name.removesuffix(suffix) for suffix in SUFFIXES for path in self.folder.glob(f"*{suffix}"))
        folders = (path.parent.name for path in self.folder.glob("*/adapter_config.json"))
        yield from sorted({name for name in (*files, *folders) if NAME.fullmatch(name)})


class DatabaseStore:
    """Adapters in the table `adapters` of a database, with the columns `name` (key) and `data` (bytes).

    Args:
        url: of SQLAlchemy, such as `sqlite:///adapters.db`.

    Raises:
        ValueError: the database cannot be opened, or has no such table.
        ImportError: SQLAlchemy or the driver of the database is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            import sqlalchemy as sql
        except ImportError as error:
            raise ImportError(f"A store in a database needs SQLAlchemy. {pip_install('[serve]')}") from error
        self._sql: Any = sql
        try:
            self.engine = sql.create_engine(url, pool_pre_ping=True)
            found = sql.inspect(self.engine)
            columns = {c["name"] for c in found.get_columns("adapters")} if found.has_table("adapters") else set()
        except sql.exc.SQLAlchemyError as error:
            raise ValueError(f"The store {url!r} cannot be opened: {str(error).splitlines()[0]}.") from None
        if not columns >= {"name", "data"}:
            raise ValueError(
                f"The store {url!r} has no table 'adapters' with the columns 'name' and 'data'. Create it: "
                "CREATE TABLE adapters (name VARCHAR(128) PRIMARY KEY, data BLOB NOT NULL)."
            )
        self._table = sql.Table(
            "adapters", sql.MetaData(), sql.Column("name", sql.String), sql.Column("data", sql.LargeBinary)
        )

    def get(self, name: str) -> Stored | None:
        check_name(name)
        query = self._sql.select(self._table.c.data).where(self._table.c.name == name)
        with self.engine.connect() as connection:
            data = connection.execute(query).scalar()
        if data is not None and len(data) > MAX_BYTES:
            raise ValueError(f"{name!r} has {len(data)} bytes, more than the {MAX_BYTES} of an adapter.")
        return None if data is None else bytes(data)

    def names(self) -> Iterator[str]:
        query = self._sql.select(self._table.c.name).order_by(self._table.c.name)
        with self.engine.connect() as connection:
            yield from filter(NAME.fullmatch, connection.execute(query).scalars())


class HubStore:
    """Saved adapters `ORGANIZATION/NAME` on the Hub.

    Args:
        organization: whose models are served, and no others.
    """

    def __init__(self, organization: str) -> None:
        check_name(organization)
        self.organization = organization

    def get(self, name: str) -> Stored | None:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

        check_name(name)
        repo, files = f"{self.organization}/{name}", ["adapter_config.json", "adapter_model.safetensors"]
        try:
            commit = HfApi().model_info(repo).sha  # without a commit, a failed download returns an old cached one
            return Path(snapshot_download(repo, revision=commit, allow_patterns=files))
        except (HFValidationError, RepositoryNotFoundError):
            return None
        except Exception as error:  # of the Hub, the network or the HTTP client
            reason = str(error).partition("\n")[0]
            raise ConnectionError(f"{repo} cannot be read from the Hub: {reason} Try again later.") from error

    def names(self) -> Iterator[str]:
        from huggingface_hub import HfApi

        found = HfApi().list_models(author=self.organization, filter="intrinsic")
        yield from filter(NAME.fullmatch, sorted(model.id.rpartition("/")[2] for model in found))


def open_store(url: str) -> AdapterStore:
    """Open a store of adapters.

    Args:
        url: a folder, the URL of a database for SQLAlchemy (`sqlite:///adapters.db`), or `hub:ORGANIZATION`.

    Raises:
        ValueError: there is no such store.
        ImportError: what the store needs is not installed.
    """
    if url.startswith("hub:"):
        return HubStore(url.removeprefix("hub:"))
    return DatabaseStore(url) if "://" in url else FolderStore(Path(url))
