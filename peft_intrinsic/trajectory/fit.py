"""The subspace that the snapshots of a fine-tuning span."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..projection.subspace import TYPES, Group, Subspace, SubspaceWriter
from ..tuner.base_model import values_digest
from ..tuner.names import block_of
from .record import parameters_of, snapshots

CHUNK = 2**18
"""Weights of each snapshot that are in memory at a time."""

RANK = 1e-5
"""Directions with a smaller share of the snapshots' length are rounding: the Gram matrix squares it."""

Source = str | os.PathLike | Mapping[str, torch.Tensor]


class _Snapshot:
    """One row of the matrix of snapshots: a file of ours, a checkpoint less its base, or tensors."""

    def __init__(self, source: Source, start: Mapping[str, torch.Tensor] | None) -> None:
        self.told = str(source) if isinstance(source, str | os.PathLike) else "a snapshot in memory"
        self._tensors: dict[str, torch.Tensor] = {}
        self._files: dict[str, Path] = {}
        self.base: str | None = None
        self.whole = False
        if isinstance(source, Mapping):
            self._tensors = dict(source)
            self.shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
            return
        path = Path(source)
        files = sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]
        self.shapes = {}
        for name in files:
            try:
                with safe_open(name, "pt") as file:
                    about = file.metadata() or {}
                    if "base" in about and "step" not in about:
                        raise ValueError(f"{name} is the start of a recording, or a subspace, and no snapshot.")
                    self.base = about.get("base")
                    for key in file.keys():  # noqa: SIM118
                        self._files[key] = name
                        self.shapes[key] = tuple(file.get_slice(key).get_shape())
            except (OSError, SafetensorError) as error:
                raise ValueError(f"The snapshot {name} cannot be read: {error}. Record it again.") from None
        if not self.shapes:
            raise ValueError(f"{path} holds neither snapshots nor a checkpoint in safetensors.")
        self.whole = self.base is None
        if self.whole and start is None:
            raise ValueError(
                f"{path} is a whole checkpoint. Pass base= to fit_subspace, the model from which it was tuned."
            )
        self._start = start

    def read(self, name: str, piece: tuple[slice, ...]) -> torch.Tensor:
        """A piece of a parameter, flat: `float64[weights]`."""
        if name in self._tensors:
            part = self._tensors[name].detach()[piece]
        else:
            with safe_open(self._files[name], "pt") as file:  # opened anew, so that pages read before are given back
                part = file.get_slice(name)[piece] if piece else file.get_tensor(name)
        part = part.cpu().double()
        if self.whole and self._start:
            part = part - self._start[name].detach()[piece].cpu()
        if not torch.isfinite(part).all():
            raise ValueError(f"{self.told}: {name} holds NaN or infinite values. Leave the snapshot out.")
        return part.reshape(-1)


def _read(sources: Any, base: nn.Module | None) -> tuple[list[_Snapshot], str]:
    """All snapshots, which must be of one base model and the same parameters, and the digest of their base."""
    sources = [sources] if isinstance(sources, str | os.PathLike | Mapping) else list(sources)
    files = [file for s in sources for file in ((not isinstance(s, Mapping) and snapshots(s)) or [s])]
    start = None if base is None else parameters_of(base, ".*")
    found = [_Snapshot(file, start) for file in files]
    if not found:
        raise ValueError("snapshots is empty. Record some first: TrajectoryCallback, or record.")
    # Of whole checkpoints alone, what a recording would take.
    names = next((s.shapes for s in found if not s.whole), None) or parameters_of(base, None)  # type: ignore[arg-type]
    for snapshot in found:
        if snapshot.whole:
            snapshot.shapes = {name: snapshot.shapes[name] for name in names if name in snapshot.shapes}
        unlike = {name for name, shape in snapshot.shapes.items() if found[0].shapes.get(name) != shape}
        unlike |= set(names) - set(snapshot.shapes)
        if unlike:
            raise ValueError(
                f"The snapshots are of different models: {snapshot.told} and {found[0].told} differ in "
                f"{', '.join(sorted(unlike)[:3])}. Pass those of one model."
            )
    bases = {s.base: s.told for s in found if s.base is not None}
    if base is not None:
        bases.setdefault(values_digest(base, names), "base")
    if len(bases) > 1:
        raise ValueError(
            f"The snapshots began at different weights: {' and '.join(bases.values())}. Pass those of one base model."
        )
    return found, next(iter(bases), "")


def _pieces(shape: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], int]]:
    """Pieces of a parameter of about CHUNK weights that follow each other, and the place of the first weight."""
    if not shape:
        yield (), 0
        return
    width = math.prod(shape[1:])
    if width > CHUNK and len(shape) > 1:
        for row in range(shape[0]):
            for piece, start in _pieces(shape[1:]):
                yield (slice(row, row + 1), *piece), row * width + start
        return
    height = max(1, CHUNK // max(1, width))
    for row in range(0, shape[0], height):
        yield (slice(row, min(row + height, shape[0])),), row * width


def group_names(names: Sequence[str], per: str) -> dict[str, list[str]]:
    """Which parameters share one θ: each numbered block (with what precedes its number) and the rest, or all."""
    if per == "model":
        return {"model": list(names)}
    result: dict[str, list[str]] = {}
    for name in names:
        result.setdefault(block_of(name) or "rest", []).append(name)
    number = re.compile(r"\d+")
    return dict(sorted(result.items(), key=lambda item: [int(n) for n in number.findall(item[0])] or [2**31]))


def fit_subspace(
    snapshots: Source | Sequence[Source],
    dim: int,
    per: Literal["layer", "model"] = "layer",
    center: bool = False,
    out: str | os.PathLike = "subspace.safetensors",
    base: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
) -> Subspace:
    """Right singular vectors of the snapshots, by the eigenvectors of their Gram matrix (Zhang et al. 2023, section 3).

    With t snapshots (rows) of D weights, W Wᵀ = U Σ² Uᵀ and V = Wᵀ U Σ⁻¹. Memory is that of t chunks of weights,
    whatever D is; the result goes to disk piece by piece, `dim · D` numbers.

    Args:
        snapshots: a recording's folder; or a list of such folders, single snapshot files, tensors by name (ways from
            the base), and checkpoints (files or folders in safetensors, which need `base`).
        dim: directions of every group.
        per: `"layer"`, directions of its own for each numbered block, as in the paper, or `"model"`.
        center: take the snapshots' mean off first: principal components. The paper does not.
        out: the file to write.
        base: the model that checkpoints were tuned from; only the parameters of its numbered blocks count then.
        dtype: of the file: float32, or bfloat16 in half the room.

    Raises:
        ValueError: fewer snapshots than `dim`, or their ways from the start span fewer directions; snapshots of
            different models; values that are not finite; an option without meaning.

    Returns:
        The file, opened: `groups` have singular values and explained variance.
    """
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"dim must be a number of directions, at least 1, got {dim!r}.")
    if per not in ("layer", "model"):
        raise ValueError(f"per must be 'layer' or 'model', got {per!r}.")
    if dtype not in TYPES:
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}.")
    rows, digest = _read(snapshots, base)
    if len(rows) < dim:
        raise ValueError(f"dim={dim} is more than the {len(rows)} snapshots. Record more, or choose a smaller dim.")
    shapes = rows[0].shapes
    groups, mixes = [], []
    for label, names in group_names(list(shapes), per).items():
        group, mix = _solve(label, names, rows, dim, center)
        groups.append(group)
        mixes.append(mix)
    about = {"base": digest, "snapshots": str(len(rows)), "center": str(center)}
    with SubspaceWriter(out, shapes, groups, dtype, about) as writer:
        for group, mix in zip(groups, mixes, strict=True):
            for name in group.parameters:
                for part, start in _pieces(shapes[name]):
                    writer.write(name, start, mix @ torch.stack([row.read(name, part) for row in rows]))
    return Subspace(out)


def _solve(label: str, names: list[str], rows: list[_Snapshot], dim: int, center: bool) -> tuple[Group, torch.Tensor]:
    """A group, and what its directions are of the snapshots: `float64[dim, t]`."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for name in names:
        for part, _ in _pieces(rows[0].shapes[name]):
            block = torch.stack([row.read(name, part) for row in rows])
            gram += block @ block.T
    middle = torch.eye(len(rows), dtype=torch.float64) - float(center) / len(rows)
    values, vectors = np.linalg.eigh((middle @ gram @ middle).numpy())
    values, vectors = np.maximum(values[::-1], 0), np.ascontiguousarray(vectors[:, ::-1])
    singular = np.sqrt(values)
    rank = int((singular > RANK * float(gram.trace()) ** 0.5).sum())
    if rank < dim:
        raise ValueError(
            f"The snapshots of {label} span {rank} directions{' around their mean' if center else ''}, fewer than "
            f"dim={dim}: they are constant, or repeat each other. Choose dim={rank}, or record other steps."
            if rank
            else f"The snapshots of {label} do not move at all. Record a run that trains these parameters."
        )
    # Eigenvectors of a centred matrix are orthogonal to the mean: they centre the snapshots by themselves.
    mix = torch.from_numpy(vectors[:, :dim] / singular[:dim]).T
    share = (values[:dim] / values.sum()).tolist()
    return Group(label, names, singular[:dim].tolist(), share), mix
