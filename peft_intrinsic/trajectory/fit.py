"""Fitting a subspace to the snapshots of a fine-tuning run."""

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
"""Number of weights of each snapshot that are in memory at a time."""

RANK = 1e-5
"""Smallest length of a direction relative to the snapshots. Below it is rounding, which the Gram matrix squares."""

Source = str | os.PathLike | Mapping[str, torch.Tensor]


class _Snapshot:
    """A row of the matrix of snapshots: a recorded file, a checkpoint minus its base, or tensors."""

    def __init__(self, source: Source, start: Mapping[str, torch.Tensor] | None) -> None:
        self.label = str(source) if isinstance(source, str | os.PathLike) else "a snapshot in memory"
        self._tensors = dict(source) if isinstance(source, Mapping) else {}
        self._files: dict[str, Path] = {}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.base: str | None = None
        self.whole = False
        if isinstance(source, Mapping):
            return
        path = Path(source)
        files = sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]
        for name in files:
            try:
                with safe_open(name, "pt") as file:
                    about = file.metadata() or {}
                    if "base" in about and "step" not in about:
                        raise ValueError(f"{name} is the start of a recording, or a subspace. Leave it out.")
                    self.base = about.get("base")
                    for key in file.keys():  # noqa: SIM118
                        self._files[key] = name
                        self.shapes[key] = tuple(file.get_slice(key).get_shape())
            except (OSError, SafetensorError) as error:
                raise ValueError(f"The snapshot {name} cannot be read: {error}. Record it again.") from None
        if not self.shapes:
            raise ValueError(f"{path} holds neither snapshots nor a checkpoint in safetensors. Name another folder.")
        self.whole = self.base is None
        if self.whole and start is None:
            raise ValueError(f"{path} is a whole checkpoint. Pass base=, the model from which it was fine-tuned.")
        self._start = start

    def read(self, name: str, piece: tuple[slice, ...]) -> torch.Tensor:
        """Read a piece of a parameter: `float64[weights]`."""
        if name in self._tensors:
            part = self._tensors[name].detach()[piece]
        else:
            with safe_open(self._files[name], "pt") as file:  # opened for each piece, to release the pages before
                part = file.get_slice(name)[piece] if piece else file.get_tensor(name)
        part = part.cpu().double()
        if self.whole and self._start:
            part = part - self._start[name].detach()[piece].cpu()
        if not torch.isfinite(part).all():
            raise ValueError(f"{self.label}: {name} holds NaN or infinite values. Leave the snapshot out.")
        return part.reshape(-1)


def _read(sources: Any, base: nn.Module | None) -> tuple[list[_Snapshot], str]:
    """Open all snapshots, which must be of one base model and the same parameters, with the digest of their base."""
    sources = [sources] if isinstance(sources, str | os.PathLike | Mapping) else list(sources)
    files = [file for s in sources for file in ((not isinstance(s, Mapping) and snapshots(s)) or [s])]
    start = None if base is None else parameters_of(base, ".*")
    rows = [_Snapshot(file, start) for file in files]
    if not rows:
        raise ValueError("snapshots is empty. Record some first, with TrajectoryCallback or record.")
    # Checkpoints have all parameters. Only those that a recording selects by default are used.
    names = next((row.shapes for row in rows if not row.whole), None) or parameters_of(base, None)  # type: ignore[arg-type]
    for snapshot in rows:
        if snapshot.whole:
            snapshot.shapes = {name: snapshot.shapes[name] for name in names if name in snapshot.shapes}
        unlike = {name for name, shape in snapshot.shapes.items() if rows[0].shapes.get(name) != shape}
        unlike |= set(names) - set(snapshot.shapes)
        if unlike:
            raise ValueError(
                f"The snapshots are of different models: {snapshot.label} and {rows[0].label} differ in "
                f"{', '.join(sorted(unlike)[:3])}. Pass snapshots of one model."
            )
    bases = {row.base: row.label for row in rows if row.base is not None}
    if base is not None:
        bases.setdefault(values_digest(base, names), "base")
    if len(bases) > 1:
        raise ValueError(
            f"The snapshots have different base models: {' and '.join(bases.values())}. Pass those of one base."
        )
    return rows, next(iter(bases), "")


def _cut(shape: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], int]]:
    """Cut a parameter into consecutive pieces of about CHUNK weights. Yield each with the index of its first weight."""
    if not shape:
        yield (), 0
        return
    width = math.prod(shape[1:])
    if width > CHUNK and len(shape) > 1:
        for row in range(shape[0]):
            for piece, start in _cut(shape[1:]):
                yield (slice(row, row + 1), *piece), row * width + start
        return
    height = max(1, CHUNK // max(1, width))
    for row in range(0, shape[0], height):
        yield (slice(row, min(row + height, shape[0])),), row * width


def group_names(names: Sequence[str], per: str) -> dict[str, list[str]]:
    """Group parameters by numbered block, such as `"bert.encoder.layer.0"`, and `"rest"`; or all as `"model"`."""
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
    """Fit a subspace: the right singular vectors of the snapshots (Zhang et al. 2023, section 3).

    With t snapshots of D weights as rows of W, W Wᵀ = U Σ² Uᵀ and V = Wᵀ U Σ⁻¹. Memory holds t chunks of weights for
    every D. The file has `dim · D` entries and is written piece by piece.

    Args:
        snapshots: folder of a recording. Or a list of such folders, snapshot files, changes since the base as tensors
            by name, and checkpoints (files or folders in safetensors, which need `base`).
        dim: number of directions of every group.
        per: `"layer"` gives each numbered block its own directions, as in the paper; `"model"` has one group.
        center: subtract the mean of the snapshots first, for principal components. The paper does not.
        out: path of the file to write.
        base: model from which checkpoints were fine-tuned. If all snapshots are checkpoints, only the parameters of its
            numbered blocks are used.
        dtype: dtype of the file: float32, or bfloat16 for half the size.

    Returns:
        The opened file, whose `groups` have singular values and explained variance.

    Raises:
        ValueError: the snapshots are fewer than `dim`, span fewer directions, are of different models or not finite; or
            an option is invalid.

    Example:
        subspace = fit_subspace("runs/sst2", dim=16, out="sst2.safetensors")
        config = IntrinsicConfig(d=subspace.dim, projection="trajectory", subspace="sst2.safetensors")
    """
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"dim={dim!r} is no positive integer. Use a number of directions.")
    if per not in ("layer", "model"):
        raise ValueError(f"per={per!r} is not supported. Use 'layer' or 'model'.")
    if dtype not in TYPES:
        raise ValueError(f"dtype={dtype} is not supported. Use torch.float32 or torch.bfloat16.")
    rows, digest = _read(snapshots, base)
    if len(rows) < dim:
        raise ValueError(f"dim={dim} exceeds the {len(rows)} snapshots. Record more, or use dim ≤ {len(rows)}.")
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
                for part, start in _cut(shapes[name]):
                    writer.write(name, start, mix @ torch.stack([row.read(name, part) for row in rows]))
    return Subspace(out)


def _solve(label: str, names: list[str], rows: list[_Snapshot], dim: int, center: bool) -> tuple[Group, torch.Tensor]:
    """Compute the directions of a group, as combinations of the snapshots: `float64[dim, t]`."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for name in names:
        for part, _ in _cut(rows[0].shapes[name]):
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
            f"dim={dim}, because some are linear combinations of others. Use dim={rank}, or record other steps."
            if rank
            else f"The snapshots of {label} do not change. Record a run that trains these parameters."
        )
    # Eigenvectors of a centered matrix are orthogonal to (1, …, 1), so `mix` centers the snapshots.
    mix = torch.from_numpy(vectors[:, :dim] / singular[:dim]).T
    explained = (values[:dim] / values.sum()).tolist()
    return Group(label, names, singular[:dim].tolist(), explained), mix
