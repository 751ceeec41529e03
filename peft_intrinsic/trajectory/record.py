"""Snapshots of a fine-tuning: how far the parameters have moved from where they began."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from ..tuner.base_model import base_places, values_digest
from ..tuner.names import block_of, fits

START = "start.safetensors"
SNAPSHOT = "snapshot-{:08d}.safetensors"


def snapshots(folder: str | os.PathLike) -> list[Path]:
    """The snapshot files of a recording, in the order of their steps."""
    return sorted(Path(folder).glob("snapshot-*.safetensors"))


def step_of(path: Path) -> int:
    """The training step of a snapshot file."""
    return int(path.stem.removeprefix("snapshot-"))


def parameters_of(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Parameter]:
    """Names and parameters that a recording takes, tied ones once, under their first name.

    Args:
        model: plain, or with adapters.
        pattern: regular expression for whole names; None takes numbered blocks, the encoder layers of the paper.

    Raises:
        ValueError: none match, or their values are not at hand.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    first: dict[int, tuple[str, Any]] = {}
    wanted = set()
    for name, (module, own) in base_places(model).items():
        parameter = module._parameters[own]
        first.setdefault(id(parameter), (name, parameter))
        if block_of(name) if pattern is None else fits("parameters", pattern, name):
            wanted.add(id(parameter))
    found = {key: place for key, place in first.items() if key in wanted}
    if not found:
        raise ValueError(
            f"parameters={pattern!r} matches none of the model's parameters (None takes those of numbered blocks). "
            'Pass a regular expression for whole names, such as ".*".'
        )
    for name, parameter in found.values():
        if parameter.is_meta or hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id"):
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
        dtype: of the snapshot on disk. What is stored is the way from the start, of which float16 keeps about three
            digits down to 6e-5, and steps of 6e-8 below.
        gradients: store the parameters' gradients instead.

    Raises:
        ValueError: the recording began with other parameters, has not begun, or with step 0 holds snapshots of a run
            already; or a value is not finite.
    """
    folder = Path(folder)
    if not step:
        _check_empty(folder)
        found = parameters_of(model, parameters)
        values = {name: p.detach().cpu().contiguous() for name, p in found.items()}
        return _write(values, folder / START, {"base": values_digest(model, found)})
    if not (folder / START).exists():
        raise ValueError(f"{folder} has no start. Call record with step=0 before the first step of training.")
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
                raise ValueError(f"{name} has no gradient: it is frozen, or backward() was not called.")
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
        ValueError: `every` is no positive number; `parameters` is no regular expression; the folder holds the recording
            of another run; see `record`.
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
            fits("parameters", parameters, "")  # raises where it is no expression
        self.folder, self.every, self.parameters, self.dtype = Path(folder), every, parameters, dtype

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep the start, or drop what lies after the checkpoint that is resumed."""
        if not state.is_world_process_zero:
            return
        if not state.global_step:
            return record(model, self.folder, 0, self.parameters)
        if not (self.folder / START).exists():
            raise ValueError(
                f"{self.folder} has no start, but the run resumes at step {state.global_step}. Record from step 0 on."
            )
        for path in snapshots(self.folder):
            if step_of(path) > state.global_step:
                path.unlink()
        return None

    def _record(self, state: Any, model: Any) -> None:
        if state.is_world_process_zero:
            record(model, self.folder, state.global_step, self.parameters, self.dtype)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Every so many steps, and the last one: at the end Trainer may have put the best model in its place."""
        last = control.should_training_stop or state.global_step >= state.max_steps
        if last or (self.every and state.global_step % self.every == 0):
            self._record(state, model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Every epoch."""
        if not self.every:
            self._record(state, model)
