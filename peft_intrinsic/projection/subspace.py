"""Files of learned subspaces: safetensors, with the part of every direction that belongs to each parameter."""

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
    """Compute the first 16 digits of the SHA-256 of a subspace file, whose own digest is read as zeros."""
    digest, zeros = hashlib.sha256(), b"0" * DIGEST
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        digest.update(re.sub(rb'("digest": ")[0-9a-f]+"', rb"\g<1>" + zeros + b'"', file.read(length)))
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()[:DIGEST]


@dataclass(frozen=True)
class Group:
    """Parameters with common directions.

    Args:
        name: prefix of a numbered block, `"rest"`, or `"model"`.
        parameters: names in the order of the model.
        singular_values: singular values of the matrix of snapshots, largest first, one for each direction.
        explained: fraction of the snapshots' squared length (their variance, if centered) along each direction.
    """

    name: str
    parameters: list[str]
    singular_values: list[float]
    explained: list[float]


class Subspace:
    """Directions in the space of a model's parameters, orthonormal within each group.

    Opening reads the header alone; `directions` reads one parameter.

    Args:
        path: path of a file that `fit_subspace` wrote.

    Attributes:
        groups: groups of parameters with common directions.
        base: digest of the base model's values of these parameters; empty if no base was given.
        digest: digest of the contents.
        snapshots: number of snapshots that were fitted.
        shapes: shape of each parameter, by name.

    Raises:
        ValueError: the file is absent, or is no subspace file.
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
                f"subspace={str(path)!r} cannot be read ({error}). Pass the path of a file that fit_subspace wrote, or "
                "restore it beside the adapter."
            ) from None
        try:
            if meta["format"] != FORMAT:
                raise KeyError(meta["format"])
            self.groups = [Group(**group) for group in json.loads(meta["groups"])]
            self.base, self.digest, self.snapshots = meta["base"], meta["digest"], int(meta["snapshots"])
            self.shapes = {name: shapes[name][1:] for group in self.groups for name in group.parameters}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"subspace={str(path)!r} is no subspace file of this version ({error}). Create one with fit_subspace."
            ) from None

    def verify(self) -> None:
        """Compare the digest with the contents, for which the whole file is read.

        Raises:
            ValueError: they differ.
        """
        if contents_digest(self.path) != self.digest:
            raise ValueError(
                f"subspace={str(self.path)!r} is damaged: its digest differs from that of its contents. Fit it again."
            )

    @property
    def dim(self) -> int:
        """Number of directions of all groups, which is the largest d."""
        return sum(len(group.singular_values) for group in self.groups)

    def allocate(self, d: int, names: Container[str]) -> list[tuple[Group, int, int]]:
        """Allocate θ in equal parts to the groups that hold some of `names`. The first groups get the remainder.

        Args:
            d: length of θ.
            names: names of the adapted parameters.

        Returns:
            Groups with the first coordinate of each and its number of coordinates, which weight its leading directions.

        Raises:
            ValueError: d is less than the number of groups, or exceeds their directions.
        """
        groups = [group for group in self.groups if any(name in names for name in group.parameters)]
        room = [len(group.singular_values) for group in groups]
        if not len(groups) <= d <= sum(room):
            raise ValueError(
                f"θ has {d} entries (d minus the number of λ), but the {len(groups)} groups of {self.path} allow from "
                f"{len(groups)} to {sum(room)}. Change d, or fit another subspace."
            )
        counts = [0] * len(room)
        while rest := d - sum(counts):
            for i in [i for i, count in enumerate(counts) if count < room[i]][:rest]:
                counts[i] += 1
        return [(group, sum(counts[:i]), counts[i]) for i, group in enumerate(groups)]

    def directions(self, name: str, count: int) -> torch.Tensor:
        """Read the part of a parameter in the first directions of its group: `float32[count, *shape]`."""
        with torch.device("cpu"), safe_open(self.path, "pt") as file:  # slices lie on torch's default device
            return file.get_slice(name)[:count].float()


class SubspaceWriter:
    """Writer of a subspace file in pieces, so that no tensor of it is whole in memory.

    The file gets its name when it is complete; an error leaves an older file unchanged.

    Args:
        path: path of the file.
        shapes: shape of each parameter, by name.
        groups: groups of parameters, see `Subspace`.
        dtype: float32 or bfloat16.
        about: further metadata, `base` and `snapshots` among them.
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
        self._start, self._size, end = {}, {}, 0
        table: dict[str, Any] = {}
        for group in groups:
            for name in group.parameters:
                shape = [len(group.singular_values), *shapes[name]]
                start, end = end, end + math.prod(shape) * dtype.itemsize
                table[name] = {"dtype": TYPES[dtype], "shape": shape, "data_offsets": [start, end]}
                self._start[name], self._size[name] = start, math.prod(shapes[name])
        self._length = end
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
        """Write consecutive weights of a parameter, the first at index `start`, in all directions: `[dim, weights]`."""
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
