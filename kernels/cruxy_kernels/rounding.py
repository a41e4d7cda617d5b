"""Stochastic rounding of fp32 to fp16 and bfloat16: small steps survive in 16-bit parameters, without any state.

A value between two neighbours takes the upper one with a probability equal to its distance from the lower one
(in units of their gap), so the rounding is right on average; a value that is representable stays. The random
bits are a hash of (step, tensor, element), hence equal in every run. Measured against round-to-nearest and a
compensation byte by `cruxy-triton bench rounding`.

Magnitudes beyond the largest finite value of the format saturate there. Hash: "lowbias32" by Chris Wellons
(nullprogram.com/blog/2018/07/31), public domain.
"""

# pyright: reportArgumentType=false

import triton
import triton.language as tl


@triton.jit
def hash32(x):
    """A well-mixed uint32 of a uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(step, tensor, element):
    """A uint32 for each element index (int64) of tensor number `tensor` in step number `step` (int32)."""
    low = element.to(tl.uint32)
    high = (element >> 32).to(tl.uint32)
    seed = hash32(step.to(tl.uint32) * 0x9E3779B9 + hash32(tensor.to(tl.uint32)))
    return hash32(low ^ hash32(seed + high))


@triton.jit
def round_stochastic(values, random, TYPE: tl.constexpr):
    """`values` (fp32) in storage format TYPE: float16, or the int16 bits of a bfloat16."""
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if TYPE == "bf16":
        finite = magnitude < 0x7F800000
        # Adding below the kept bits carries into them with the right probability.
        rounded = tl.minimum((magnitude + (random & 0xFFFF)) >> 16, 0x7F7F)
        rounded = tl.where(finite, rounded, magnitude >> 16)
        return (rounded | ((bits >> 16) & 0x8000)).to(tl.int16)
    else:
        # Below 2^-14 fp16 has a fixed gap of 2^-24: moved up by 2^-14, values have that gap in every case.
        a = magnitude.to(tl.float32, bitcast=True)
        offset = tl.where(a < 0.00006103515625, 0.00006103515625, 0.0)
        moved = (a + offset).to(tl.uint32, bitcast=True)
        kept = ((moved + (random & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True) - offset
        kept = tl.where(a <= 3.4028234663852886e38, tl.minimum(kept, 65504.0), a)
        signed = kept.to(tl.uint32, bitcast=True) | (bits & 0x80000000)
        return signed.to(tl.float32, bitcast=True).to(tl.float16)
