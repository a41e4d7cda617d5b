"""How kernels load and store the elements of a tensor: fp32, fp16, and bfloat16 as its bits.

A chunk is LINES x 64 consecutive elements. Whole, aligned chunks take 128-bit accesses; in the others (MASKED)
every element is guarded. bfloat16 is handled as int16: cards before sm_80 have no bfloat16 arithmetic.
Imported only where Triton is.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

# The pointer casts stand inside load_raw and store_raw: a hint put on the result of a call is lost when the call
# is inlined, and without the hint every access falls to one element.


@triton.jit
def load_raw(address, start, local, remaining, TYPE: tl.constexpr, MASKED: tl.constexpr):
    """The stored elements start + local of the tensor at `address` (int64); 0 from `remaining` on when MASKED.

    Unmasked, the address has to be a multiple of 16.
    """
    if TYPE == "fp32":
        pointer = address.to(tl.pointer_type(tl.float32))
    elif TYPE == "fp16":
        pointer = address.to(tl.pointer_type(tl.float16))
    elif TYPE == "bf16":
        pointer = address.to(tl.pointer_type(tl.int16))
    else:  # bytes, as signed ones
        pointer = address.to(tl.pointer_type(tl.int8))
    if MASKED:
        return tl.load(pointer + start + local, mask=local < remaining, other=0)
    else:
        return tl.load(tl.multiple_of(pointer, 16) + start + local)


@triton.jit
def store_raw(address, start, local, remaining, values, TYPE: tl.constexpr, MASKED: tl.constexpr):
    """Stores what load_raw loads."""
    if TYPE == "fp32":
        pointer = address.to(tl.pointer_type(tl.float32))
    elif TYPE == "fp16":
        pointer = address.to(tl.pointer_type(tl.float16))
    elif TYPE == "bf16":
        pointer = address.to(tl.pointer_type(tl.int16))
    else:  # bytes, as signed ones
        pointer = address.to(tl.pointer_type(tl.int8))
    if MASKED:
        tl.store(pointer + start + local, values, mask=local < remaining)
    else:
        tl.store(tl.multiple_of(pointer, 16) + start + local, values)


@triton.jit
def bf16_bits_to_float(bits):
    """fp32 of the 16 bits (int16) of a bfloat16: it is the upper half."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def float_to_bf16_bits(values):
    """The 16 bits (int16) of the nearest bfloat16, ties to even; infinities and NaN stay what they are."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    nearest = bits + 0x7FFF + ((bits >> 16) & 1)
    # Rounding would carry a NaN over into the sign, and cut to 16 bits one with a low payload is an infinity.
    special = bits | tl.where(magnitude > 0x7F800000, 0x400000, 0)
    return (tl.where(magnitude < 0x7F800000, nearest, special) >> 16).to(tl.int16)


@triton.jit
def load_values(address, start, local, remaining, TYPE: tl.constexpr, MASKED: tl.constexpr):
    """What load_raw loads, as fp32."""
    raw = load_raw(address, start, local, remaining, TYPE, MASKED)
    if TYPE == "bf16":
        return bf16_bits_to_float(raw)
    else:
        return raw.to(tl.float32)


@triton.jit
def store_nearest(address, start, local, remaining, values, TYPE: tl.constexpr, MASKED: tl.constexpr):
    """Stores fp32 values in TYPE, rounded to nearest."""
    if TYPE == "bf16":
        store_raw(address, start, local, remaining, float_to_bf16_bits(values), TYPE, MASKED)
    elif TYPE == "fp16":
        store_raw(address, start, local, remaining, values.to(tl.float16), TYPE, MASKED)
    else:
        store_raw(address, start, local, remaining, values, TYPE, MASKED)
