"""Mixed batches, in which every sample has an adapter of its own: the routes for the layers."""

from __future__ import annotations

import contextvars
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .batch_first import batch_first, count_samples, named_arguments


@dataclass(frozen=True)
class Route:
    """θ and λ for every sample of a batch, in the projection of one adapter."""

    adapter: str
    theta: torch.Tensor  # [batch, d − m]
    scales: torch.Tensor  # λ, [batch, m]

    def scaled(self, group: int | None) -> torch.Tensor:
        """θ, or λ_group · θ, of every sample: `[batch, d − m]`."""
        return self.theta if group is None else self.theta * self.scales[:, group, None]


_CHOSEN: contextvars.ContextVar[Mapping[Any, list[Route] | None]] = contextvars.ContextVar("chosen")


class _ThreadState(threading.local):
    """State of a thread: its latest choice and the running forward pass."""

    def __init__(self) -> None:  # not on the class: a compiler reads the instance
        self.routes: list[Route] | None = None
        self.backward = -1  # number of the backward pass in which it was made, −1 outside
        self.rows: int | None = None
        self.depth = 0  # of forward passes of the model or its encoder
        self.repeats = 1  # rows of each sample, for beams and returned sequences
        self.proving = False


@torch.library.custom_op("peft_intrinsic::confirmed", mutates_args=())
def _confirmed(theta: torch.Tensor) -> torch.Tensor:
    """Check θ in a compiled forward pass, which distinguishes threads but not contexts.

    Raises:
        RuntimeError: the running coroutine did not choose it.
    """
    routes = [route for chosen in _CHOSEN.get({}).values() for route in chosen or ()]
    if not any(route.theta.data_ptr() == theta.data_ptr() for route in routes):
        raise RuntimeError(_ELSEWHERE)
    return theta.clone()


@_confirmed.register_fake
def _(theta: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(theta)


_confirmed.register_autograd(lambda ctx, grad: grad)


_ELSEWHERE = (
    "Adapters are chosen for the samples of a batch, but not in this thread or coroutine. Start a thread with "
    "Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=…), or call select() inside it."
)


_UNKNOWN = (
    "A backward pass computes activations again, and which adapters the samples had is unknown to it. Checkpoint "
    "activations by the model's gradient_checkpointing_enable(), which transformers' Trainer calls too."
)


class Choices:
    """The adapters that each context (coroutine, thread) has chosen for the samples of one model.

    A copy of a model, by `deepcopy` or `pickle`, has no choice.
    """

    def __init__(self) -> None:
        self.open = self.crowded = False  # whether there is a choice, and more than one
        self.differentiated = False  # whether a mixed batch may have had a backward pass
        self._threads: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._here = _ThreadState()
        self._first: dict[str, bool] = {}  # by parameter: whether the first axis of its module's input is the batch
        self._proved: set[Any] = set()  # calls with this proof: model or encoder, names of arguments
        self._proof = threading.Lock()

    def __reduce__(self) -> tuple[type[Choices], tuple[()]]:
        return Choices, ()

    @contextmanager
    def use(self, routes: list[Route] | None) -> Iterator[None]:
        """Within this context, every sample has its own θ and λ instead of those of the active adapters (None)."""
        token = _CHOSEN.set({**_CHOSEN.get({}), self: routes})
        before = self._here.routes, self._here.backward
        self._here.routes, self._here.backward = routes, torch._C._current_graph_task_id()
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)
            self._here.routes, self._here.backward = before
            _CHOSEN.reset(token)

    def checkpoint(self, call: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call torch's `checkpoint` so that the backward pass computes `function` again with the choice of this one.

        The backward pass may run in another thread, after the context of the choice has ended.
        """
        if torch.compiler.is_compiling():  # the compiled graph contains the choice
            return call(function, *args, **kwargs)
        return call(partial(self._run, self.routes(), function), *args, **kwargs)

    def _run(self, routes: list[Route] | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.use(routes) if torch._C._current_graph_task_id() != -1 else nullcontext():
            return function(*args, **kwargs)

    def _count(self, change: int) -> None:
        with self._lock:
            self._threads[threading.get_ident()] += change
            self._threads += Counter()  # without zeros
            self.open, self.crowded = bool(self._threads), self._threads.total() > 1

    def routes(self) -> list[Route] | None:
        """The choice of this context, None without one.

        Raises:
            RuntimeError: only another thread has chosen. A thread that is started inside `select` does not inherit the
                choice and would silently use another adapter. Or a backward pass does not know the choice.
        """
        if self.differentiated and not torch.compiler.is_compiling():
            backward = torch._C._current_graph_task_id()
            if backward not in (-1, self._here.backward):
                raise RuntimeError(_UNKNOWN)
        if not self.open:
            return None
        if self._here.proving:
            return []
        if torch.compiler.is_compiling() and not self.crowded:  # a compiler cannot follow a context variable
            if self._here.routes is None:
                raise RuntimeError(_ELSEWHERE)
            return [Route(route.adapter, _confirmed(route.theta), route.scales) for route in self._here.routes]
        found = _CHOSEN.get({}).get(self)
        if found is None and threading.get_ident() not in self._threads:
            raise RuntimeError(_ELSEWHERE)
        return found

    @property
    def proving(self) -> bool:
        """Whether the running forward pass only proves which axis is the batch, with other batch sizes."""
        return self._here.proving

    def enter(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a forward pass, note the rows of the batch, and prove which modules are batch first."""
        here = self._here
        if not self.open or here.proving:
            return
        here.depth += 1
        if here.depth > 1:
            return
        here.rows = count_samples(root, _numbered(args, kwargs))
        if not torch.compiler.is_compiling():
            self.prove(root, args, kwargs)

    @torch.compiler.disable
    def prove(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the first forward pass with these names of arguments, prove which modules are batch first."""
        self.differentiated |= torch.is_grad_enabled()
        arguments = _numbered(args, kwargs)
        rows, here = count_samples(root, arguments), self._here
        call = id(root), frozenset(name for name, value in arguments.items() if value is not None)
        with self._proof:
            if rows is not None and call not in self._proved:
                here.proving = True
                try:
                    found = batch_first(root, rows, named_arguments(root, args, kwargs), lambda: here.proving)
                finally:
                    here.proving = False
                self._first |= {name: first and self._first.get(name, True) for name, first in found.items()}
                self._proved.add(call)

    def leave(self) -> None:
        """Forget them after that forward pass."""
        here = self._here
        if not here.proving:
            here.depth = max(here.depth - 1, 0)
            here.rows = here.rows if here.depth else None

    def forget(self) -> None:
        """Forget all proofs, after other parameters have been adapted."""
        self._first, self._proved = {}, set()

    @contextmanager
    def repeating(self, repeats: int) -> Iterator[None]:
        """Within this context, each sample may have this many successive rows."""
        before, self._here.repeats = self._here.repeats, repeats
        try:
            yield
        finally:
            self._here.repeats = before

    def match(self, name: str, theta: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Move θ to the device of x. If every sample has its own, also expand θ and x to the same length.

        Beams and returned sequences repeat each sample. Positions and the like have one row for all samples.

        Raises:
            ValueError: the first axis of x may not be the batch.
        """
        theta = theta.to(x.device)
        if theta.dim() == 1:
            return theta, x
        count = len(theta)
        rows = self._here.rows or count
        first = self._first.get(name)
        if x.dim() > 1 and len(x) == 1 and count <= rows and first is not False and self._first:
            return theta, x.expand(count, *x.shape[1:])
        repeats = rows // count
        if not (first and repeats in (1, self._here.repeats) and len(x) == rows == repeats * count):
            if first is None:
                self._proved.clear()  # the next pass may call it
            raise ValueError(
                f"Adapters were chosen for {count} samples, but the layer of {name} got an input of shape "
                f"{tuple(x.shape)} in a batch of {rows}, whose first axis may not be the batch. Choose "
                "one adapter for each row, run the whole model uncompiled once, or leave the layer out: "
                f"exclude_modules=['{name.rpartition('.')[0]}']."
            )
        return theta.repeat_interleave(repeats, 0), x


def _numbered(args: Any, kwargs: Any) -> dict[str, Any]:
    return {**{str(i): value for i, value in enumerate(args)}, **kwargs}


def spread(vectors: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshape a vector for each sample, `[batch, k]`, to broadcast over x, `[batch, …, k]`. Keep a single vector."""
    return vectors if vectors.dim() == 1 else vectors.view(len(x), *[1] * (x.dim() - 2), -1)
