"""Snapshots of a fine-tuning: how far the parameters have moved from where they began."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from ..tuner.layer import base_places
from ..tuner.learnt import values_digest
from ..tuner.targets import block_of, fits

START = "start.safetensors"
SNAPSHOT = "snapshot-{:08d}.safetensors"


def snapshots(folder: str | os.PathLike) -> list[Path]:
    """The snapshot files of a recording, in the order of their steps."""
    return sorted(Path(folder).glob("snapshot-*.safetensors"))


def step_of(path: Path) -> int:
    """The training step of a snapshot file."""
    return int(path.stem.removeprefix("snapshot-"))


def parameters_of(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Parameter]:
    """Names and parameters that a recording takes, tied ones once.

    Args:
        model: plain, or with adapters.
        pattern: regular expression for whole names; None takes numbered blocks, the encoder layers of the paper.

    Raises:
        ValueError: none match, or their values are not at hand.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    found: dict[int, tuple[str, Any]] = {}
    for name, (module, own) in base_places(model).items():
        parameter = module._parameters[own]
        if block_of(name) if pattern is None else fits("parameters", pattern, name):
            found.setdefault(id(parameter), (name, parameter))
    if not found:
        raise ValueError(
            f"parameters={pattern!r} matches none of the model's parameters (None takes those of numbered blocks). "
            'Pass a regular expression for whole names, such as ".*".'
        )
    for name, parameter in found.values():
        if parameter.is_meta or hasattr(parameter, "full_tensor"):
            raise ValueError(f"{name} is offloaded or sharded, so it cannot be recorded. Record on one device.")
    return dict(found.values())


def _write(tensors: dict[str, torch.Tensor], path: Path, about: dict[str, str]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    save_file(tensors, new, about)
    os.replace(new, path)


@torch.no_grad()
def record(
    model: nn.Module,
    folder: str | os.PathLike,
    step: int,
    parameters: str | None = None,
    dtype: torch.dtype = torch.float16,
    gradients: bool = False,
) -> None:
    """Write a snapshot. The first call, before training and with step 0, keeps where the parameters begin.

    Args:
        model: as it is now; full fine-tuning moves its own parameters.
        folder: of the recording.
        step: of training. A snapshot of the same step is replaced.
        parameters: regular expression for whole names; None takes those of numbered blocks. Read at the first call.
        dtype: of the snapshot on disk. What is stored is the way from the start, which is small, so that float16
            rounds it less than bfloat16 does.
        gradients: store the parameters' gradients instead.

    Raises:
        ValueError: the recording began with other parameters, or has not begun; or a value is not finite.
    """
    folder = Path(folder)
    begun = (folder / START).exists()
    if not begun and step:
        raise ValueError(f"{folder} has no start. Call record with step=0 before the first step of training.")
    if not begun:
        found = parameters_of(model, parameters)
        values = {name: p.detach().cpu().contiguous() for name, p in found.items()}
        return _write(values, folder / START, {"base": values_digest(model, found)})
    if not step and not gradients:
        return None
    with safe_open(folder / START, "pt") as start:
        shapes = {name: tuple(start.get_slice(name).get_shape()) for name in start.keys()}  # noqa: SIM118
        found = {name: p for name, p in parameters_of(model, ".*").items() if name in shapes}
        unlike = [name for name, shape in shapes.items() if name not in found or tuple(found[name].shape) != shape]
        if unlike:
            raise ValueError(
                f"{folder} was begun with another model: {', '.join(unlike[:3])} are not there in that shape. Use "
                "another folder."
            )
        values = {}
        for name, parameter in found.items():
            value = parameter.grad if gradients else parameter.detach().cpu().float() - start.get_tensor(name).float()
            if value is None:
                raise ValueError(f"{name} has no gradient. Call backward() first.")
            values[name] = value.cpu().to(dtype).contiguous()
            if not torch.isfinite(values[name]).all():
                raise ValueError(
                    f"{name} is not finite at step {step}. Lower the learning rate, or if the values are only too "
                    f"large for {dtype}, pass dtype=torch.float32."
                )
        _write(values, folder / SNAPSHOT.format(step), {"base": start.metadata()["base"], "step": str(step)})


def record_gradients(
    model: nn.Module,
    folder: str | os.PathLike,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], torch.Tensor],
    parameters: str | None = None,
) -> None:
    """Write the gradients of a few batches at the pretrained weights as snapshots: no fine-tuning at all.

    Args:
        model: whose parameters require gradients. It is not changed, and has no gradients afterwards.
        folder: of the recording, new or empty.
        batches: whatever `loss` takes, one snapshot each.
        loss: of the model on a batch, a scalar.
        parameters: see `record`.

    Raises:
        ValueError: see `record`; or the folder holds snapshots.
    """
    _check_empty(Path(folder))
    record(model, folder, 0, parameters)
    for i, batch in enumerate(batches, 1):
        model.zero_grad(set_to_none=True)
        loss(model, batch).backward()
        record(model, folder, i, dtype=torch.bfloat16, gradients=True)  # their sizes span many decades
    model.zero_grad(set_to_none=True)


def _check_empty(folder: Path) -> None:
    if found := snapshots(folder):
        raise ValueError(
            f"{folder} holds {len(found)} snapshots of a run, up to step {step_of(found[-1])}. Resume that run from "
            "its checkpoint, or use another folder."
        )


class TrajectoryCallback(TrainerCallback):
    """Records a full fine-tuning by `Trainer`: every epoch, or every so many steps, and at its end.

    A run that Trainer resumes from a checkpoint goes on recording; snapshots after that checkpoint are taken again.

    Args:
        folder: of the recording.
        every: steps between snapshots; None is an epoch.
        parameters, dtype: see `record`.

    Raises:
        ValueError: `every` is no positive number; the folder holds the recording of another run; see `record`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        every: int | None = None,
        parameters: str | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every must be a number of steps, at least 1, or None for epochs, got {every!r}.")
        if parameters is not None:
            re.compile(parameters)
        self.folder, self.every, self.parameters, self.dtype = Path(folder), every, parameters, dtype

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep the start, or drop what lies after the checkpoint that is resumed."""
        if not state.is_world_process_zero:
            return
        if not state.global_step:
            _check_empty(self.folder)
            (self.folder / START).unlink(missing_ok=True)
        elif not (self.folder / START).exists():
            raise ValueError(
                f"{self.folder} has no start, but the run resumes at step {state.global_step}. Record from step 0 on."
            )
        for path in snapshots(self.folder):
            if step_of(path) > state.global_step:
                path.unlink()
        if not state.global_step:
            record(model, self.folder, 0, self.parameters)

    def _record(self, state: Any, model: Any) -> None:
        if state.is_world_process_zero:
            record(model, self.folder, state.global_step, self.parameters, self.dtype)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Every so many steps."""
        if self.every and state.global_step % self.every == 0:
            self._record(state, model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Every epoch."""
        if not self.every:
            self._record(state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The last step, unless it was recorded."""
        if not (self.folder / SNAPSHOT.format(state.global_step)).exists():
            self._record(state, model)
