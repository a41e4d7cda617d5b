"""Stochastic rounding to 16-bit parameters in plain PyTorch: the twin of rounding.py, bit for bit.

The random bits are a hash of (step, tensor, element), so a run that is repeated or resumed rounds the same
way. PyTorch has no arithmetic on uint32; int32 wraps in the same way, and a mask makes its shift logical.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def hash32(x: Tensor) -> Tensor:
    """A well-mixed int32 of an int32: "lowbias32" by Chris Wellons, public domain."""
    x = (x ^ _shift(x, 16)) * _signed(0x7FEB352D)
    x = (x ^ _shift(x, 15)) * _signed(0x846CA68B)
    return x ^ _shift(x, 16)


def random_bits(step: Tensor, tensors: Sequence[int], sizes: Sequence[int], start: int = 0) -> Tensor:
    """int32 bits for consecutive runs of elements: `sizes[i]` of tensor number `tensors[i]`, from `start`.

    Args:
        step: 0-dim tensor, the number of the step.
        start: index of the first element (the same for every run).
    """
    device = step.device
    count = torch.tensor(sizes, device=device)
    seed = hash32(torch.tensor(tensors, dtype=torch.int32, device=device))
    seed = hash32(step.to(torch.int32) * _signed(0x9E3779B9) + seed)
    longest = max(sizes)
    element = torch.arange(start, start + longest, device=device)
    high = (element >> 32).to(torch.int32)
    low = element.to(torch.int32)
    if len(sizes) == 1:
        return hash32(low ^ hash32(seed + high))
    seed = torch.repeat_interleave(hash32(seed), count, output_size=sum(sizes))
    return hash32(torch.cat([low[:size] for size in sizes]) ^ seed)


def round_stochastic(values: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` (fp32) as float16 or bfloat16, up or down with the probability that is right on average.

    A representable value stays. Finite values beyond the format's largest saturate there.
    """
    magnitude = values.view(torch.int32) & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = ((magnitude + (random & 0xFFFF)) >> 16).clamp_(max=0x7F7F) << 16
        rounded = torch.where(magnitude < 0x7F800000, rounded, magnitude)
        return rounded.view(torch.float32).copysign(values).to(dtype)
    a = values.abs()
    # Below 2^-14 fp16 has a fixed gap of 2^-24: moved up by 2^-14, values have that gap in every case.
    offset = torch.where(a < 2.0**-14, 2.0**-14, 0.0)
    moved = (a + offset).view(torch.int32)
    kept = ((moved + (random & 0x1FFF)) & ~0x1FFF).view(torch.float32) - offset
    kept = torch.where(a.isfinite(), kept.clamp(max=65504.0), a)
    return kept.copysign(values).to(dtype)
