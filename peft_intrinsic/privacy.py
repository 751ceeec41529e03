"""Private training with opacus: per-sample gradients of θ and λ, from one backward pass.

opacus samples the batches, clips the gradients, adds the noise and accounts for ε (Abadi et al. 2016, Deep Learning
with Differential Privacy, arXiv 1607.00133). This module gives it the gradients.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._pytree import tree_leaves

from .tuner.adapter_names import check_mixable
from .tuner.base_model import evaluation_mode
from .tuner.batches import Route
from .version import pip_install

_CALLS: WeakKeyDictionary[Any, Counter[Any]] = WeakKeyDictionary()
"""By model and code of the losses: the number of batches so far."""


def _private_parameters(model: Any) -> list[torch.nn.Parameter]:
    """θ and λ of the active adapter, after all checks that need no forward pass."""
    active = getattr(model, "active_adapters", [])
    vector = getattr(getattr(model, "base_model", None), "vector", None)
    if len(active) != 1 or vector is None:
        raise ValueError(
            f"Active adapters {active}: private training needs exactly one, of an IntrinsicConfig. Pass your PeftModel "
            "itself, not the module that make_private returns."
        )
    if beside := model.peft_config[active[0]].trained_beside:
        raise ValueError(
            f"{beside} trains parameters outside θ, which have no per-sample gradients. Train without this option."
        )
    vectors = (vector.intrinsic_theta, vector.intrinsic_lambda)
    own = [each[active[0]].weight for each in vectors if active[0] in each]
    if not all(parameter.requires_grad for parameter in own):
        raise ValueError(f"Adapter {active[0]!r} is frozen. Call model.set_requires_grad({active[0]!r}) first.")
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(parameter is each for each in own)
    ]
    if others:
        raise ValueError(
            f"These parameters are trained outside θ and have no per-sample gradients: {', '.join(others)}. Freeze "
            "them with requires_grad_(False)."
        )
    norms = [
        name
        for name, module in model.get_base_model().named_modules()
        if (isinstance(module, _BatchNorm) and module.running_mean is None)
        or (isinstance(module, _NormBase) and module.training and module.track_running_stats)
    ]
    if norms:
        raise ValueError(
            f"These layers use or store statistics of all samples of a batch: {', '.join(norms)}. Call eval() on them "
            "after model.train(), or use a model without them."
        )
    check_mixable(model.get_base_model(), model.base_model.tuner_layers(), {active[0]})
    return own


def _select(batch: Any, rows: Any) -> Any:
    """Some samples of a batch."""
    if isinstance(batch, Mapping):
        return {key: _select(value, rows) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_select(value, rows) for value in batch]
    if not isinstance(batch, torch.Tensor) or not batch.dim():
        raise ValueError(
            f"The batch contains {str(batch)[:60]!r} ({type(batch).__name__}), but each of its values must be a tensor "
            "whose first axis has the samples. Leave the others out."
        )
    return batch[rows]


def _compute_losses(
    model: Any, losses: Callable[[Any], torch.Tensor], batch: Any, copies: list[torch.Tensor]
) -> torch.Tensor:
    """The losses of a batch, in which every sample has its own θ and λ, `[batch, …]`."""
    scales = copies[1] if len(copies) > 1 else copies[0][:, :0]
    with model.base_model.vector.choices.use([Route(model.active_adapter, copies[0], scales)]):
        return losses(batch)


def _check_isolated(model: Any, losses: Callable[[Any], torch.Tensor], batch: Any, copies: list[torch.Tensor]) -> None:
    """Check that each loss of a batch depends on its own sample alone: without dropout, then as the model trains.

    The batch is split once for each binary digit of the indexes, so that every two samples are apart in one of the
    splits. A loss must be the same without the other part, and when the other part has a very different θ. Where a
    detached value hides the influence, gradients show it: those of a weighted sum are the weighted gradients. In
    training mode, the same random numbers give the same dropout, so a loss must not change with the other part's θ.

    BatchNorm, which mixes samples in training mode only, is found by its type.
    """
    size, random = len(copies[0]), torch.Generator().manual_seed(0)
    digits = range((size - 1).bit_length())
    parts = [[i for i in range(size) if i >> digit & 1 == value] for digit in digits for value in (0, 1)]
    noise = [torch.randn(copy.shape, generator=random).to(copy) for copy in copies]

    def shift(strength: float, kept: list[int]) -> torch.Tensor:
        moved = [copy + strength * change for copy, change in zip(copies, noise, strict=True)]
        for one, copy in zip(moved, copies, strict=True):
            one[kept] = copy[kept]
        return _compute_losses(model, losses, batch, moved)

    def differentiate(weights: torch.Tensor) -> torch.Tensor:
        return torch.cat(torch.autograd.grad(_compute_losses(model, losses, batch, copies) @ weights, copies), 1)

    with evaluation_mode(model):
        with torch.no_grad():
            together, strength = _compute_losses(model, losses, batch, copies), 1.0
            limit = 0.05 * together.abs().max()  # half precision depends on the batch, slightly
            while strength < 1e6 and (shift(strength, []) - together).abs().mean() < 20 * limit:
                strength *= 4
            changed = torch.zeros_like(together, dtype=torch.bool)
            for part in parts:
                for values in (losses(_select(batch, part)), shift(strength, part)[part]):
                    changed[part] |= ~((together[part] - values).abs() <= limit)
        weights = torch.randn(size, generator=random).to(together)
        gradients = differentiate(torch.ones_like(weights))
        gap = (differentiate(weights) - weights[:, None] * gradients).norm(dim=1)
        changed |= gap > 0.05 * gradients.norm(dim=1).max()
    if model.training:
        device, runs = copies[0].device, []
        for kept in (list(range(size)), *parts):
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                runs.append(shift(strength, kept))
        for part, run in zip(parts, runs[1:], strict=True):
            changed[part] |= ~((runs[0] - run)[part].abs() <= limit)
    if changed.any():
        raise ValueError(
            f"The losses of samples {changed.nonzero().flatten().tolist()[:5]} depend on other samples of the batch, "
            "so a clipped gradient does not bound the influence of a sample. Average over the tokens of each sample "
            "alone, and use layers and losses that treat every sample alone."
        )


def compute_sample_gradients(model: Any, losses: Callable[[Any], torch.Tensor], batch: Any) -> None:
    """Compute the gradients of θ and λ for every sample, and store them where opacus expects them.

    Call it instead of the forward pass and `loss.backward()`. Every sample gets its own copy of θ and λ, so one
    backward pass gives all gradients. They are in `grad_sample` of θ and λ, `[batch, d]`.

    Args:
        model: a `PeftModel` with one active intrinsic adapter, whose parameters are the only trainable ones.
        losses: a function from the batch to the loss of every sample, `[batch]`. It calls the model.
        batch: the tensors of a batch, in lists or dictionaries. Their first axis is the batch. It may be empty, as
            Poisson sampling can draw no sample; `losses` is then not called.

    Raises:
        ValueError: a parameter outside θ and λ is trainable; a module mixes samples or cannot be mixed; the losses are
            not one for each sample, or depend on other samples, which is checked in batches 1, 4, 16, 64, …; the batch
            contains other values than tensors; a gradient is not finite; or the gradients of the batch before have not
            been used and cleared.

    Example:
        >>> engine = opacus.PrivacyEngine()
        >>> _, optimizer, loader = engine.make_private(
        ...     module=model, optimizer=optimizer, data_loader=loader, grad_sample_mode="no_op",
        ...     noise_multiplier=find_noise(epsilon=1.0, delta=1e-5, sample_rate=1 / len(loader), steps=100),
        ...     max_grad_norm=100.0,
        ... )
        >>> def losses(batch):
        ...     return cross_entropy(model(batch["input_ids"]).logits, batch["labels"], reduction="none")
        >>> for batch in loader:
        ...     compute_sample_gradients(model, losses, batch)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """
    parameters = _private_parameters(model)
    if any(getattr(parameter, "grad_sample", None) is not None for parameter in parameters):
        raise ValueError(
            "The gradients of the batch before are still there. Call optimizer.step() and optimizer.zero_grad() after "
            "every batch: a sample that counts twice has twice the influence."
        )
    sizes = {len(tensor) for tensor in tree_leaves(_select(batch, slice(None)))}
    if len(sizes) > 1:
        raise ValueError(
            f"The tensors of the batch have first axes of {sorted(sizes)}, but each must have the samples."
        )
    size = max(sizes, default=0)
    gradients = copies = [parameter.detach().repeat(size, 1).requires_grad_() for parameter in parameters]
    if size:
        values = _compute_losses(model, losses, batch, copies)
        if values.shape != (size,) or not values.requires_grad:
            raise ValueError(
                f"losses(batch) must be one value for each of the {size} samples, with a gradient, got the shape "
                f"{tuple(values.shape)}. Use reduction='none', and average over the tokens of each sample alone."
            )
        gradients = list(torch.autograd.grad(values.sum(), copies))
    finite = torch.cat(gradients, 1).isfinite().all(1)
    if not finite.all():
        raise ValueError(
            f"The gradients of samples {(~finite).nonzero().flatten().tolist()[:5]} of the batch are not finite."
        )
    if size > 1:
        code = getattr(getattr(losses, "func", losses), "__code__", type(losses))
        count = _CALLS.setdefault(model, Counter())[code] + 1
        if 4 ** ((count.bit_length() - 1) // 2) == count:  # a power of 4
            _check_isolated(model, losses, batch, copies)
        _CALLS[model][code] = count
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad_sample = gradient.detach()  # type: ignore[attr-defined]


def pop_norms(model: Any) -> torch.Tensor:
    """Norms of the per-sample gradients of the latest batch, `[batch]`. They are removed from the model.

    Use it with public data, to choose opacus' `max_grad_norm` and to check it. Norms of private data are not covered
    by ε.

    Args:
        model: a `PeftModel`, after `compute_sample_gradients`.

    Raises:
        ValueError: the model has no per-sample gradients.
    """
    parameters = _private_parameters(model)
    if any(getattr(parameter, "grad_sample", None) is None for parameter in parameters):
        raise ValueError("The model has no per-sample gradients. Call compute_sample_gradients first.")
    norms = torch.cat([parameter.grad_sample for parameter in parameters], 1).norm(dim=1)  # type: ignore[attr-defined]
    for parameter in parameters:
        parameter.grad_sample = None  # type: ignore[attr-defined]
    return norms


def check_clipping(norms: torch.Tensor, max_grad_norm: float) -> None:
    """Warn if nearly all or nearly none of the gradients are longer than the clip.

    Args:
        norms: of the gradients of public samples, `[batch]`.
        max_grad_norm: the norm to which opacus clips.

    Raises:
        ValueError: there are no norms, or one is not finite.
    """
    if not len(norms) or not norms.isfinite().all():
        raise ValueError(f"norms={norms} must have at least one value, all of them finite. Pass a public batch.")
    clipped = (norms > max_grad_norm).float().mean().item()
    if not 0.05 <= clipped <= 0.95:
        warnings.warn(
            f"max_grad_norm={max_grad_norm:g} clips {clipped:.0%} of these gradients, whose median is "
            f"{norms.median().item():g}. {'Raise' if clipped > 0.5 else 'Lower'} it towards the median.",
            stacklevel=2,
        )


def find_noise(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str = "prv") -> float:
    """The smallest noise multiplier σ for a budget (ε, δ), found by opacus.

    Args:
        epsilon: ε, the largest log-ratio of probabilities with and without one sample.
        delta: δ, the probability with which this may not hold; at most 1 / (number of samples).
        sample_rate: probability with which a sample is in a batch, 1 / len(loader) for opacus' loader.
        steps: number of optimizer steps.
        accountant: opacus' accountant, `"prv"` or `"rdp"`.

    Raises:
        ImportError: opacus is not installed. The extra `privacy` installs it.
        ValueError: an argument is outside its range, or no noise reaches ε.
    """
    try:
        from opacus.accountants import create_accountant
        from opacus.accountants.utils import MAX_SIGMA, get_noise_multiplier
    except ImportError as error:
        raise ImportError(f"{error}. {pip_install('[privacy]')}") from None
    for name, value, top in (("epsilon", epsilon, 100.0), ("delta", delta, 0.5), ("sample_rate", sample_rate, 1.0)):
        if not 0 < value <= top:
            raise ValueError(f"{name}={value} must be greater than 0 and at most {top:g}.")
    if not 1 <= steps < 1e9 or steps != int(steps):
        raise ValueError(f"steps={steps} must be a whole number greater than 0.")
    # The series of opacus converges slowly where half of the samples are in a batch.
    limit, most = create_accountant(accountant), 100.0 if 0.45 < sample_rate < 0.55 else MAX_SIGMA
    limit.history = [(most, sample_rate, int(steps))]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Optimal order is the")  # the search begins with far too much noise
            if most < MAX_SIGMA and limit.get_epsilon(delta) > epsilon:
                raise ValueError("budget is too low")
            return get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=sample_rate,
                steps=int(steps),
                accountant=accountant,
            )
    except ValueError as error:
        if "budget is too low" not in str(error):
            raise
        raise ValueError(
            f"epsilon={epsilon} cannot be reached by accountant={accountant!r} at delta={delta:g}: with a noise "
            f"multiplier of {most:g}, it computes {limit.get_epsilon(delta):.3g}. Choose a larger epsilon or another "
            "accountant."
        ) from error
