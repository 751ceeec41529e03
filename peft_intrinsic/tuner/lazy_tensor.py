"""Lazy tensor for an adapted parameter that is read outside its layer; materialized on first use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

Value = Callable[..., torch.Tensor]


class LazyTensor(torch.Tensor):
    """Lazy `base + offset` with the dtype, device and shape of the base. The first operation computes the values.

    It is a node of the autograd graph, so gradients reach θ even where a custom `autograd.Function` takes it unchanged.
    `isinstance(…, nn.Parameter)` is true, as for the base parameter.
    """

    materialize: Callable[[], torch.Tensor]  # base + offset

    # torch's fast paths look for one, and give up.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, base: torch.Tensor, inputs: Sequence[torch.Tensor], value: Value) -> LazyTensor:
        """Make the lazy tensor `value(*inputs)`, in the shape, dtype and device of `base`."""
        computed: list[torch.Tensor] = []

        def materialize() -> torch.Tensor:
            if not computed:
                with torch.no_grad():
                    computed.append(value(*inputs))
            return computed[0]

        lazy = _Promise.apply(base, value, *inputs)
        lazy.materialize, lazy._is_param = materialize, True
        return lazy

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            given |= kwargs or {}
            for argument in func._schema.arguments:
                value = given.get(argument.name)
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, cls):
                    raise RuntimeError(
                        f"{func} writes into an adapted parameter, which is computed from the base parameter at each "
                        "read. Write before attaching the adapter, or into the parameter of get_base_layer()."
                    )
        args, kwargs = tree_map_only(LazyTensor, lambda lazy: lazy.materialize(), (args, kwargs or {}))
        return func(*args, **kwargs)


class _Promise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: torch.Tensor, value: Value, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.value = value
        ctx.save_for_backward(*inputs)
        return torch.Tensor._make_wrapper_subclass(LazyTensor, base.shape, dtype=base.dtype, device=base.device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        again = torch.is_grad_enabled()  # create_graph=True: the gradients must have gradients too
        with torch.enable_grad():
            saved = ctx.saved_tensors
            inputs = [t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_() for t in saved]
            grads = torch.autograd.grad(ctx.value(*inputs), inputs, grad, create_graph=again)
        return grad if ctx.needs_input_grad[0] else None, None, *grads
