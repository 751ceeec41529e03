"""A learnt subspace on disk: one safetensors file, in which each parameter has its part of every direction."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

FORMAT = "peft_intrinsic subspace 1"
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
DIGEST = 16


def contents_digest(path: Path) -> str:
    """SHA-256 of a subspace file, cut to 16 digits, its own digest read as zeros."""
    digest, nothing = hashlib.sha256(), b"0" * DIGEST
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        digest.update(re.sub(rb'("digest": ")[0-9a-f]+"', rb"\g<1>" + nothing + b'"', file.read(length)))
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()[:DIGEST]


@dataclass(frozen=True)
class Group:
    """Parameters that share one θ.

    Args:
        name: a transformer block, or `"model"`.
        parameters: in the order of the model.
        singular_values: of the snapshots (rows) along each direction, largest first: `dim` of them.
        explained: share of the snapshots' squared length, centred if they were, along each direction.
    """

    name: str
    parameters: list[str]
    singular_values: list[float]
    explained: list[float]


class Subspace:
    """Directions in the space of a model's parameters, orthonormal within each group.

    Args:
        path: of the file that `fit_subspace` wrote.

    Attributes:
        groups: which parameters move together.
        base: digest of the base model's parameters that are moved; empty where no base was named.
        digest: of the contents.
        snapshots: how many it was learnt from.
        shapes: of the parameters.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            with safe_open(self.path, "pt") as file:
                meta = file.metadata() or {}
                keys = file.keys()
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in keys}
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"subspace={str(path)!r} cannot be read ({error}). Name the file that fit_subspace wrote, or put it "
                "back beside the adapter."
            ) from None
        try:
            if meta["format"] != FORMAT:
                raise KeyError(meta["format"])
            self.groups = [Group(**group) for group in json.loads(meta["groups"])]
            self.base, self.digest, self.snapshots = meta["base"], meta["digest"], int(meta["snapshots"])
            self.shapes = {name: shapes[name][1:] for group in self.groups for name in group.parameters}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"subspace={str(path)!r} is no subspace file of this version ({error}). Make one with fit_subspace."
            ) from None

    def verify(self) -> None:
        """Raises ValueError where the contents are not what was written. Reads the whole file."""
        if contents_digest(self.path) != self.digest:
            raise ValueError(
                f"subspace={str(self.path)!r} is damaged: its digest is not that of its contents. Fit it again."
            )

    @property
    def dim(self) -> int:
        """Directions of all groups together: the most numbers that can be trained."""
        return sum(len(group.singular_values) for group in self.groups)

    def windows(self, d: int, names: Container[str]) -> list[tuple[Group, int, int]]:
        """The groups that hold some of `names`, the first coordinate of θ of each and how many.

        Equal parts, each the group's leading directions; what is over goes to the first groups.

        Raises:
            ValueError: some group would get none, or they have fewer than d.
        """
        groups = [group for group in self.groups if any(name in names for name in group.parameters)]
        room = [len(group.singular_values) for group in groups]
        if not len(groups) <= d <= sum(room):
            raise ValueError(
                f"A θ of {d} numbers (d less the λ) does not fit the subspace {self.path}, whose {len(groups)} groups "
                f"take from {len(groups)} to {sum(room)}. Choose d accordingly, or fit another subspace."
            )
        counts = [0] * len(room)
        while rest := d - sum(counts):
            wanting = [i for i, count in enumerate(counts) if count < room[i]]
            for i in wanting[:rest]:
                counts[i] += 1
        return [(group, sum(counts[:i]), counts[i]) for i, group in enumerate(groups)]

    def directions(self, name: str, count: int) -> torch.Tensor:
        """The part of a parameter in the first directions of its group: `float32[count, *shape]`."""
        with torch.device("cpu"), safe_open(self.path, "pt") as file:  # slices lie on torch's default device
            return file.get_slice(name)[:count].float()


class SubspaceWriter:
    """Writes a subspace piece by piece: no tensor of the file is ever whole in memory.

    The file appears under its name when all is written; an error leaves an older one as it is.

    Args:
        path: of the file.
        shapes: of the parameters.
        groups: see `Subspace`.
        dtype: float32 or bfloat16.
        about: base and number of snapshots.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        shapes: Mapping[str, Sequence[int]],
        groups: Sequence[Group],
        dtype: torch.dtype,
        about: Mapping[str, str],
    ) -> None:
        self.path, self.dtype = Path(path), dtype
        self._new = self.path.with_name(self.path.name + ".new")
        self._start, self._size, place = {}, {}, 0
        table: dict[str, Any] = {}
        for group in groups:
            for name in group.parameters:
                shape = [len(group.singular_values), *shapes[name]]
                end = place + math.prod(shape) * dtype.itemsize
                table[name] = {"dtype": TYPES[dtype], "shape": shape, "data_offsets": [place, end]}
                self._start[name], self._size[name] = place, math.prod(shapes[name])
                place = end
        self._length = place
        meta = {"format": FORMAT, **about, "groups": json.dumps([vars(group) for group in groups])}
        self._table = {"__metadata__": {**meta, "digest": "0" * DIGEST}, **table}

    def __enter__(self) -> SubspaceWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._new.open("w+b")
        self._file.write(self._header())
        self._data = self._file.tell()
        self._file.truncate(self._data + self._length)
        return self

    def _header(self) -> bytes:
        text = json.dumps(self._table).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Weights `start` and on of a parameter, in all directions: `[dim, weights]`."""
        raw = values.to(self.dtype).contiguous().view(torch.uint8).numpy()
        for k, row in enumerate(raw):
            self._file.seek(self._data + self._start[name] + (k * self._size[name] + start) * self.dtype.itemsize)
            self._file.write(row.tobytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.flush()
                self._table["__metadata__"]["digest"] = contents_digest(self._new)
                self._file.seek(0)
                self._file.write(self._header())
                self._file.close()
                os.replace(self._new, self.path)
        finally:
            self._file.close()
            self._new.unlink(missing_ok=True)
