"""Stochastic rounding of fp32 to fp16 and bfloat16: small steps survive in 16-bit parameters, without any state.

A value between two neighbours takes the upper one with a probability equal to its distance from the lower one
(in units of their gap), so the rounding is right on average; a value that is representable stays. Magnitudes beyond
the largest finite value of the format saturate there. The random bits are a hash of (seed, step, tensor, element), so
a run that is repeated or resumed rounds the same way. Hash: "lowbias32" by Chris Wellons
(nullprogram.com/blog/2018/07/31), public domain. Measured against rounding to nearest and a compensation byte by
`cruxy-triton bench rounding`.

The specification in PyTorch stands first, the same in Triton behind it; they agree bit for bit.
"""

# pyright: reportArgumentType=false

from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import HAS_TRITON

STEP_FACTOR = 0x9E3779B9  # 2^32 over the golden ratio: neighbouring steps give distant seeds


def signed(value: int) -> int:
    """PyTorch has no arithmetic on uint32; int32 wraps in the same way."""
    return value - (1 << 32) if value >= 1 << 31 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift: int32's own is arithmetic."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def hash32(x: Tensor) -> Tensor:
    """A well-mixed int32 of an int32."""
    x = (x ^ _shift(x, 16)) * signed(0x7FEB352D)
    x = (x ^ _shift(x, 15)) * signed(0x846CA68B)
    return x ^ _shift(x, 16)


def random_bits(seed: Tensor, step: Tensor, tensors: Sequence[int], sizes: Sequence[int], start: int = 0) -> Tensor:
    """int32 bits for consecutive runs of elements: `sizes[i]` of tensor number `tensors[i]`, from `start`.

    Args:
        seed, step: 0-dim tensors that hold whole numbers: the optimizer's seed, and how many steps it has taken.
        start: index of the first element (the same for every run).
    """
    device = step.device
    key = hash32(torch.tensor(tensors, dtype=torch.int32, device=device) + hash32(seed.to(torch.int32)))
    key = hash32(step.to(torch.int32) * signed(STEP_FACTOR) + key)
    element = torch.arange(start, start + max(sizes), device=device)
    high = (element >> 32).to(torch.int32)
    low = element.to(torch.int32)
    if len(sizes) == 1:
        return hash32(low ^ hash32(key + high))
    count = torch.tensor(sizes, device=device)
    key = torch.repeat_interleave(hash32(key), count, output_size=sum(sizes))
    return hash32(torch.cat([low[:size] for size in sizes]) ^ key)


def round_stochastic(values: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` (fp32) as float16 or bfloat16, up or down with the probability that is right on average."""
    magnitude = values.view(torch.int32) & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        # Adding below the kept bits carries into them with the right probability.
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


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def hash32_kernel(x):
        """`hash32` of uint32."""
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        return x ^ (x >> 16)

    @triton.jit
    def random_bits_kernel(seed, step, tensor, element):
        """A uint32 for each element index (int64) of tensor number `tensor`; seed, step: int32."""
        low = element.to(tl.uint32)
        high = (element >> 32).to(tl.uint32)
        key = hash32_kernel(tensor.to(tl.uint32) + hash32_kernel(seed.to(tl.uint32)))
        key = hash32_kernel(step.to(tl.uint32) * 0x9E3779B9 + key)
        return hash32_kernel(low ^ hash32_kernel(key + high))

    @triton.jit
    def round_stochastic_kernel(values, random, TYPE: tl.constexpr):
        """`values` (fp32) in storage format TYPE: float16 ("fp16"), or the int16 bits of a bfloat16 ("bf16")."""
        bits = values.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        if TYPE == "bf16":
            finite = magnitude < 0x7F800000
            rounded = tl.minimum((magnitude + (random & 0xFFFF)) >> 16, 0x7F7F)
            # A NaN keeps its quiet bit: cut to 16 bits, one whose payload is low would be an infinity.
            special = (magnitude >> 16) | tl.where(magnitude > 0x7F800000, 0x40, 0)
            rounded = tl.where(finite, rounded, special)
            return (rounded | ((bits >> 16) & 0x8000)).to(tl.int16)
        else:
            a = magnitude.to(tl.float32, bitcast=True)
            offset = tl.where(a < 0.00006103515625, 0.00006103515625, 0.0)
            moved = (a + offset).to(tl.uint32, bitcast=True)
            kept = ((moved + (random & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True) - offset
            kept = tl.where(a <= 3.4028234663852886e38, tl.minimum(kept, 65504.0), a)
            signed = kept.to(tl.uint32, bitcast=True) | (bits & 0x80000000)
            return signed.to(tl.float32, bitcast=True).to(tl.float16)
