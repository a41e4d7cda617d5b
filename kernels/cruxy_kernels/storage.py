"""How the updates load and store parameters and momentum: fp32, 16 bits, or 8-bit codes (codec.py)."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from cruxy_kernels.codec import BLOCK, decode, encode, float_bits_to_bf16_bits
from cruxy_kernels.rounding import random_bits, round_stochastic
from cruxy_kernels.tables import EXP_AVG, EXP_AVG_SCALE, INDEX, PARAM, load_raw, load_values, store_raw


@triton.jit
def load_momentum(row, start, local, scale_local, remaining, TYPE: tl.constexpr, MASKED: tl.constexpr):
    """fp32 momentum of a chunk, decoded where it is stored in 8 bits."""
    address = tl.load(row + EXP_AVG)
    if TYPE == "int8":
        codes = load_raw(address, start, local, remaining, "int8", MASKED)
        scales = load_raw(
            tl.load(row + EXP_AVG_SCALE), start // BLOCK, scale_local, tl.cdiv(remaining, BLOCK), "bf16", MASKED
        )
        return decode(codes, scales)
    else:
        return load_values(address, start, local, remaining, TYPE, MASKED)


@triton.jit
def store_momentum(row, start, local, scale_local, remaining, m, TYPE: tl.constexpr, MASKED: tl.constexpr):
    """Stores what load_momentum loads; 16-bit momentum is rounded to nearest."""
    address = tl.load(row + EXP_AVG)
    if TYPE == "int8":
        codes, scales = encode(m)
        store_raw(address, start, local, remaining, codes, "int8", MASKED)
        store_raw(
            tl.load(row + EXP_AVG_SCALE),
            start // BLOCK,
            scale_local,
            tl.cdiv(remaining, BLOCK),
            scales,
            "bf16",
            MASKED,
        )
    elif TYPE == "bf16":
        bits = float_bits_to_bf16_bits(m.to(tl.int32, bitcast=True))
        store_raw(address, start, local, remaining, bits, "bf16", MASKED)
    elif TYPE == "fp16":
        store_raw(address, start, local, remaining, m.to(tl.float16), "fp16", MASKED)
    else:
        store_raw(address, start, local, remaining, m, "fp32", MASKED)


@triton.jit
def store_param(row, start, local, remaining, p, step, TYPE: tl.constexpr, MASKED: tl.constexpr):
    """Stores fp32 parameters; 16-bit ones with stochastic rounding (rounding.py)."""
    address = tl.load(row + PARAM)
    if TYPE == "fp32":
        store_raw(address, start, local, remaining, p, "fp32", MASKED)
    else:
        random = random_bits(step.to(tl.int32), tl.load(row + INDEX), start + local)
        store_raw(address, start, local, remaining, round_stochastic(p, random, TYPE), TYPE, MASKED)
