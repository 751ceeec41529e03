"""Scores, the masks that they stand for, and masks as bytes."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq

SPREAD = 0.025
"""Distance between the lowest and the highest score at the start under `"threshold"`."""

UNIT = 1024
"""What a score is counted in under `"bernoulli"`, so that the usual learning rate serves both."""

SURE = 30.0
"""Log-odds that leave nothing to chance."""

LOW = 4.0
"""Log-odds against being kept of a weight that a loaded mask has at zero, where training goes on."""

SLOPE = 8.0
"""How much higher the largest weight's log-odds of being kept are than the smallest's, under `"magnitude"`."""


@torch.no_grad()
def initial_scores(weight: torch.Tensor, name: str, config: Any) -> torch.Tensor:
    """The scores at the start, in the shape of the weight, float32 on its device.

    Args:
        weight: of the base layer.
        name: of the layer, which with the seed fixes the random start.
        config: `SupermaskConfig`.
    """
    place = hashlib.sha256(f"{config.seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(place[:7], "big"))
    order = weight.detach().abs().float().cpu().flatten() if config.init == "magnitude" else None
    rank = torch.rand(weight.numel(), generator=generator)
    if order is not None:
        # Equal weights, such as zeros of a pruned layer, stand in a random order.
        first = torch.argsort(rank)
        rank[first[torch.argsort(order[first], stable=True)]] = (torch.arange(len(rank)) + 0.5) / len(rank)
    if config.mask == "threshold":
        scores = SPREAD * (rank - config.initial_sparsity)
    else:
        slope = SLOPE if config.init == "magnitude" else 1e-6  # a trace of an order, so that there are no ties
        odds = slope * (rank.double() - 0.5)

        def excess(shift: float) -> float:
            return float(torch.sigmoid(-(odds + shift)).mean()) - config.initial_sparsity

        scores = ((odds + brentq(excess, -60, 60)) / UNIT).float()
    return scores.view(weight.shape).to(weight.device)


def scores_of(mask: torch.Tensor, config: Any) -> torch.Tensor:
    """Scores from which training goes on where only the mask was kept: float32, away from the threshold."""
    if config.mask == "bernoulli":
        # As many zeros are expected as the mask has: those of the lower scores, and of the higher ones the rest.
        kept, zeros = int(mask.sum()), int((~mask).sum())
        odds = kept / zeros * (1 + math.exp(LOW)) - 1 if zeros else 0.0
        low, high = (LOW, math.log(odds)) if odds > 1 else (SURE, SURE)
        return torch.where(mask, high, -low) / UNIT
    share = config.initial_sparsity
    return SPREAD / 2 * torch.where(mask, 1 - share, -max(share, 0.01))


def straight_through(scores: torch.Tensor, config: Any) -> torch.Tensor:
    """The mask of a training step, with a gradient for the scores.

    Its values are those of the binary mask, its gradient that of the scores (threshold: Bengio et al. 2013, arXiv
    1308.3432) or of σ(scores) (Bernoulli: Zhou et al. 2019, section 5).
    """
    if config.mask == "threshold":
        soft = scores
        hard = binary(scores.detach(), config).to(scores.dtype)
    else:
        soft = torch.sigmoid(UNIT * scores)
        hard = (torch.rand_like(soft) < soft).to(scores.dtype)
    return hard + (soft - soft.detach())


@torch.no_grad()
def binary(scores: torch.Tensor, config: Any) -> torch.Tensor:
    """The mask of evaluation and of the file: `bool`, True where a weight is kept."""
    if config.mask == "threshold" and not config.hold_sparsity:
        return scores > 0
    if config.mask == "threshold":
        zeros = round(config.initial_sparsity * scores.numel())
    else:
        zeros = round(float((1 - torch.sigmoid(UNIT * scores.double())).sum()))
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(zeros, largest=False, sorted=False).indices] = False
    return mask.view(scores.shape)


def packed(mask: torch.Tensor) -> torch.Tensor:
    """One bit for each weight: `uint8[⌈n/8⌉]`, on the CPU."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))


def unpacked(bits: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What `packed` packed, on the device of the bits."""
    count = math.prod(shape)
    shifts = torch.arange(7, -1, -1, device=bits.device, dtype=torch.uint8)
    return (bits.unsqueeze(-1) >> shifts & 1).view(-1)[:count].view(shape).bool()


def coded(mask: torch.Tensor) -> torch.Tensor:
    """A mask as bytes, by asymmetric numeral systems: the number of zeros, 8 bytes, and the code, `uint8[…]`."""
    from ..codec.entropy import encode

    symbols = mask.detach().cpu().numpy().reshape(-1).astype(np.int32)
    zeros = int(len(symbols) - symbols.sum())
    code = encode(symbols, 2, [0])[1] if 0 < zeros < len(symbols) else b""
    return torch.from_numpy(np.frombuffer(zeros.to_bytes(8, "little") + code, dtype=np.uint8).copy())


def decoded(data: torch.Tensor, shape: torch.Size, name: str) -> torch.Tensor:
    """What `coded` coded: `bool[shape]`.

    Raises:
        ValueError: the bytes are no mask of so many weights.
    """
    from ..codec.entropy import decode

    raw, count = data.cpu().numpy().tobytes(), math.prod(shape)
    zeros = int.from_bytes(raw[:8], "little")
    if data.dtype != torch.uint8 or len(raw) < 8 or zeros > count:
        raise ValueError(f"{name}: the file holds no mask of {count} weights. Save the adapter again.")
    if zeros in (0, count):
        return torch.full(shape, zeros == 0)
    try:
        symbols = decode(raw[8:], count, np.array([zeros, count - zeros]))
    except ValueError as error:
        raise ValueError(f"{name}: the mask in the file is damaged ({error}). Save the adapter again.") from None
    mask = torch.from_numpy(symbols.astype(bool)).view(shape)
    if int((~mask).sum()) != zeros:
        raise ValueError(f"{name}: the mask in the file is damaged (number of zeros). Save the adapter again.")
    return mask
