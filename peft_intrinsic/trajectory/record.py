"""Recordings of a fine-tuning run: snapshots of the change of its parameters since the start."""

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

from ..tuner.base_model import base_parameters, values_digest
from ..tuner.names import block_of, is_match

START = "start.safetensors"
SNAPSHOT = "snapshot-{:08d}.safetensors"


def snapshots(folder: str | os.PathLike) -> list[Path]:
    """List the snapshot files of a recording, in the order of their steps.

    Args:
        folder: folder of the recording.
    """
    return sorted(Path(folder).glob("snapshot-*.safetensors"))


def get_step(path: Path) -> int:
    """Read the training step from the name of a snapshot file."""
    return int(path.stem.removeprefix("snapshot-"))


def parameters_of(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Parameter]:
    """Select the parameters of a recording by name. Tied parameters appear once, under their first name.

    Args:
        model: model with or without adapters.
        pattern: regular expression for whole names. None selects numbered blocks, the encoder layers of the paper.

    Raises:
        ValueError: none match, or one is offloaded or sharded.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    first: dict[int, tuple[str, Any]] = {}
    wanted = set()
    for name, (module, own) in base_parameters(model).items():
        parameter = module._parameters[own]
        first.setdefault(id(parameter), (name, parameter))
        if block_of(name) if pattern is None else is_match("parameters", pattern, name):
            wanted.add(id(parameter))
    selected = dict(first[key] for key in first if key in wanted)
    if not selected:
        raise ValueError(
            f"parameters={pattern!r} matches none of the model's parameters (None selects those of numbered blocks). "
            'Pass a regular expression for whole names, such as ".*".'
        )
    for name, parameter in selected.items():
        if parameter.is_meta or hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id"):
            raise ValueError(f"{name} is offloaded or sharded, so it cannot be recorded. Record on one device.")
    return selected


def _write(tensors: dict[str, torch.Tensor], path: Path, about: dict[str, str]) -> None:
    """Write a file completely or not at all."""
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
    """Write a snapshot, or with step 0 the start of a recording.

    Call it with step 0 before training. A snapshot holds the change of the parameters since the start.

    Args:
        model: model in full fine-tuning.
        folder: folder of the recording.
        step: training step. An older snapshot of the same step is replaced.
        parameters: regular expression for whole names, used at step 0. None selects the parameters of numbered blocks.
        dtype: dtype of the snapshot's tensors. float16 has about three digits of changes down to 6e-5, and a
            resolution of 6e-8 below.
        gradients: store the parameters' gradients instead.

    Raises:
        ValueError: the recording has no start, its start is of another model, step 0 finds snapshots of another run, or
            a value is not finite.
    """
    folder = Path(folder)
    if not step:
        if files := snapshots(folder):
            raise ValueError(
                f"{folder} holds {len(files)} snapshots of a run, up to step {get_step(files[-1])}. Resume it from "
                "its checkpoint, or use another folder."
            )
        selected = parameters_of(model, parameters)
        values = {name: p.detach().cpu().contiguous() for name, p in selected.items()}
        return _write(values, folder / START, {"base": values_digest(model, selected)})
    if not (folder / START).exists():
        raise ValueError(f"{folder} has no start. Call record with step=0 before the first step of training.")
    with safe_open(folder / START, "pt") as start:
        shapes = {name: tuple(start.get_slice(name).get_shape()) for name in start.keys()}  # noqa: SIM118
        selected = {name: p for name, p in parameters_of(model, ".*").items() if name in shapes}
        unlike = [n for n, shape in shapes.items() if n not in selected or tuple(selected[n].shape) != shape]
        if unlike:
            raise ValueError(
                f"{folder} was started with another model: this one lacks {', '.join(unlike[:3])} in the recorded "
                "shape. Use another folder."
            )
        values = {}
        for name, parameter in selected.items():
            value = parameter.grad if gradients else parameter.detach().cpu().float() - start.get_tensor(name).float()
            if value is None:
                raise ValueError(f"{name} has no gradient. Let it require one, and call backward() before.")
            values[name] = value.cpu().to(dtype).contiguous()
            if not torch.isfinite(values[name]).all():
                raise ValueError(
                    f"{name} is not finite at step {step}. Lower the learning rate. If the values only exceed the "
                    f"range of {dtype}, pass dtype=torch.float32."
                )
        _write(values, folder / SNAPSHOT.format(step), {"base": start.metadata()["base"], "step": str(step)})


def record_gradients(
    model: nn.Module,
    folder: str | os.PathLike,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], torch.Tensor],
    parameters: str | None = None,
) -> None:
    """Record the gradients of a few batches at the pretrained weights, without fine-tuning.

    Args:
        model: model whose parameters require gradients. It is unchanged, and has no gradients afterwards.
        folder: folder of the recording, without snapshots.
        batches: inputs of `loss`. Each gives a snapshot.
        loss: function from the model and a batch to a scalar.
        parameters: regular expression for whole names, see `record`.

    Raises:
        ValueError: the folder holds snapshots, a parameter has no gradient, or a value is not finite.
    """
    record(model, folder, 0, parameters)
    for i, batch in enumerate(batches, 1):
        model.zero_grad(set_to_none=True)
        loss(model, batch).backward()
        record(model, folder, i, dtype=torch.bfloat16, gradients=True)  # their sizes span many orders of magnitude
    model.zero_grad(set_to_none=True)


class TrajectoryCallback(TrainerCallback):
    """Callback of `Trainer` that records a full fine-tuning: every epoch or every few steps, and the last step.

    If Trainer resumes from a checkpoint, so does the recording, and later snapshots are replaced.

    Args:
        folder: folder of the recording.
        every: steps between snapshots. None records every epoch.
        parameters: regular expression for whole names, see `record`.
        dtype: dtype of the snapshots' tensors, see `record`.

    Raises:
        ValueError: `every` is no positive integer, or `parameters` no regular expression. During training: the folder
            holds the recording of another run, or a value is not finite.

    Example:
        Trainer(model, args, callbacks=[TrajectoryCallback("runs/sst2", every=32)]).train()
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        every: int | None = None,
        parameters: str | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every={every!r} is no positive integer. Use a number of steps, or None for epochs.")
        if parameters is not None:
            is_match("parameters", parameters, "")  # raises an error if it is no regular expression
        self.folder, self.every, self.parameters, self.dtype = Path(folder), every, parameters, dtype

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Record the start, or delete the snapshots after the checkpoint from which Trainer resumes."""
        if not state.is_world_process_zero:
            return
        if not state.global_step:
            return record(model, self.folder, 0, self.parameters)
        if not (self.folder / START).exists():
            raise ValueError(
                f"{self.folder} has no start, but the run resumes at step {state.global_step}. Record a run from its "
                "step 0."
            )
        for path in snapshots(self.folder):
            if get_step(path) > state.global_step:
                path.unlink()
        return None

    def _record(self, state: Any, model: Any) -> None:
        if state.is_world_process_zero:
            record(model, self.folder, state.global_step, self.parameters, self.dtype)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Record every few steps, and the last step, after which Trainer may load the best model instead."""
        last = control.should_training_stop or state.global_step >= state.max_steps
        if last or (self.every and state.global_step % self.every == 0):
            self._record(state, model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Record every epoch."""
        if not self.every:
            self._record(state, model)
