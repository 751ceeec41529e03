"""The value of a moved parameter for whoever reads it without calling its layer: made when its numbers are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

Value = Callable[..., torch.Tensor]


class EffectiveTensor(torch.Tensor):
    """Stands for `base + offset`. Has the dtype, device and shape of the base; any operation makes the numbers.

    It is a node of the autograd graph, so gradients arrive at θ even where a custom `autograd.Function` takes it as it
    is. `isinstance(…, nn.Parameter)` holds, as for the parameter that it stands for.
    """

    materialize: Callable[[], torch.Tensor]  # base + offset

    # torch's fast paths look for one, and give up.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, base: torch.Tensor, inputs: Sequence[torch.Tensor], value: Value) -> EffectiveTensor:
        """The tensor `value(*inputs)`, which has the shape, dtype and device of `base`, unmade."""
        made: list[torch.Tensor] = []

        def materialize() -> torch.Tensor:
            if not made:
                with torch.no_grad():
                    made.append(value(*inputs))
            return made[0]

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
                        f"{func} writes into a parameter that an adapter moves: it is computed anew from the base "
                        "parameter at each read. Write before attaching, or into get_base_layer()'s parameter."
                    )
        args, kwargs = tree_map_only(EffectiveTensor, lambda lazy: lazy.materialize(), (args, kwargs or {}))
        return func(*args, **kwargs)


class _Promise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: torch.Tensor, value: Value, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.value = value
        ctx.save_for_backward(*inputs)
        return torch.Tensor._make_wrapper_subclass(EffectiveTensor, base.shape, dtype=base.dtype, device=base.device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        again = torch.is_grad_enabled()  # create_graph=True: the gradients must have gradients too
        with torch.enable_grad():
            saved = ctx.saved_tensors
            inputs = [t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_() for t in saved]
            grads = torch.autograd.grad(ctx.value(*inputs), inputs, grad, create_graph=again)
        return grad if ctx.needs_input_grad[0] else None, None, *grads
