"""Scores, masks from scores, and masks as bits and as bytes."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from scipy.optimize import brentq

from .config import SupermaskConfig

# For mask="threshold":
SPREAD = 0.025  # difference of the highest and the lowest score at the start

# For mask="bernoulli", whose log-odds of a one are SCALE times the score:
SCALE = 1024  # makes the learning rates of both masks alike
SLOPE = 8.0  # difference of the log-odds of the largest and the smallest weight at the start, under init="magnitude"
LOW = 4.0  # log-odds of a zero, for the zeros of a loaded mask
SURE = 30.0  # log-odds that no sampling overturns


@torch.no_grad()
def initialize_scores(weight: torch.Tensor, name: str, config: SupermaskConfig) -> torch.Tensor:
    """Make the scores of a new adapter: `float32`, shape and device of the weight.

    Args:
        weight: weight of the base layer.
        name: name of the layer, which fixes the random start together with the seed.
        config: configuration of the adapter.
    """
    seed = hashlib.sha256(f"{config.seed} {name}".encode()).digest()[:7]
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
    order = weight.detach().abs().float().cpu().flatten() if config.init == "magnitude" else None
    rank = torch.rand(weight.numel(), generator=generator)
    if order is not None:
        # Equal weights, such as zeros of a pruned layer, get a random order.
        first = torch.argsort(rank)
        rank[first[torch.argsort(order[first], stable=True)]] = (torch.arange(len(rank)) + 0.5) / len(rank)
    if config.mask == "threshold":
        scores = SPREAD * (rank - config.initial_sparsity)
    else:
        slope = SLOPE if config.init == "magnitude" else 1e-6  # not zero, so that there are no ties
        odds = slope * (rank.double() - 0.5)

        def excess(shift: float) -> float:
            return float(torch.sigmoid(-(odds + shift)).mean()) - config.initial_sparsity

        scores = ((odds + brentq(excess, -60, 60)) / SCALE).float()
    return scores.view(weight.shape).to(weight.device)


def restore_scores(mask: torch.Tensor, config: SupermaskConfig) -> torch.Tensor:
    """Make scores that give a mask, to continue training without the saved ones: `float32`, shape of the mask."""
    if config.mask == "bernoulli":
        # Low and high scores together give as many expected zeros as the mask has.
        ones, zeros = int(mask.sum()), int((~mask).sum())
        odds = ones / zeros * (1 + math.exp(LOW)) - 1 if zeros else 0.0
        low, high = (LOW, math.log(odds)) if odds > 1 else (SURE, SURE)
        return torch.where(mask, high, -low) / SCALE
    fraction = config.initial_sparsity
    return SPREAD / 2 * torch.where(mask, 1 - fraction, -max(fraction, 0.01))


def make_training_mask(scores: torch.Tensor, config: SupermaskConfig) -> torch.Tensor:
    """Make the mask of a training step: zeros and ones, with a gradient for the scores.

    The gradient is that of the scores (threshold: straight-through, Bengio et al. 2013, arXiv 1308.3432) or of
    σ(SCALE · scores) (Bernoulli: Zhou et al. 2019, section 5).
    """
    if config.mask == "threshold":
        soft = scores
        hard = make_mask(scores.detach(), config).to(scores.dtype)
    else:
        soft = torch.sigmoid(SCALE * scores)
        hard = (torch.rand_like(soft) < soft).to(scores.dtype)
    return hard + (soft - soft.detach())


@torch.no_grad()
def make_mask(scores: torch.Tensor, config: SupermaskConfig) -> torch.Tensor:
    """Make the mask of evaluation and of the file: `bool`, shape of the scores, False where a weight is zero."""
    if config.mask == "threshold" and not config.hold_sparsity:
        return scores > 0
    if config.mask == "threshold":
        zeros = round(config.initial_sparsity * scores.numel())
    else:
        zeros = round(float((1 - torch.sigmoid(SCALE * scores.double())).sum()))
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(zeros, largest=False, sorted=False).indices] = False
    return mask.view(scores.shape)


def mask_to_bits(mask: torch.Tensor) -> torch.Tensor:
    """Store a mask of n weights in one bit for each: `uint8[⌈n/8⌉]`, on the CPU."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))


def bits_to_mask(bits: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Restore a mask from `mask_to_bits`: `bool[shape]`, on the device of the bits."""
    count = math.prod(shape)
    shifts = torch.arange(7, -1, -1, device=bits.device, dtype=torch.uint8)
    return (bits.unsqueeze(-1) >> shifts & 1).view(-1)[:count].view(shape).bool()


def encode_mask(mask: torch.Tensor) -> torch.Tensor:
    """Encode a mask as `uint8[k]`: the number of zeros (8 bytes), then its code by asymmetric numeral systems."""
    from ..codec.entropy import encode

    symbols = mask.detach().cpu().numpy().reshape(-1).astype(np.int32)
    zeros = int(len(symbols) - symbols.sum())
    code = encode(symbols, 2, [0])[1] if 0 < zeros < len(symbols) else b""
    return torch.from_numpy(np.frombuffer(zeros.to_bytes(8, "little") + code, dtype=np.uint8).copy())


def decode_mask(data: torch.Tensor, shape: torch.Size, name: str) -> torch.Tensor:
    """Decode a mask from `encode_mask`: `bool[shape]`.

    Args:
        data: `uint8[k]`.
        shape: shape of the weight.
        name: name of the layer, for messages.

    Raises:
        ValueError: the bytes are no mask of this shape.
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
