"""The 8-bit momentum codec in Triton: `encode` and `decode`, which the updates inline, and kernels for users.

Formula, constants and the reason for them: codec_reference.py, the twin in plain PyTorch. bfloat16 scales are
handled as their 16 bits, because cards before sm_80 have no bfloat16 arithmetic.
"""

# Triton reads a kernel's parameters from its source; the checker sees tensors and ints where it declares others.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from cruxy_kernels import codec_reference
from cruxy_kernels.codec_reference import check_codes, check_values, scale_count

BLOCK = tl.constexpr(codec_reference.BLOCK)
SHARPNESS = tl.constexpr(float(codec_reference.SHARPNESS))
LEVELS = tl.constexpr(float(codec_reference.LEVELS))

ROWS_A_PROGRAM = 16  # 1,024 values: 8 a thread with 4 warps


@triton.jit
def bf16_bits_to_float(bits):
    """fp32 of the 16 bits (int16) of a bfloat16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def float_bits_to_bf16_bits(bits):
    """The 16 bits (int16) of the bfloat16 nearest to the finite fp32 of these bits (int32), ties to even."""
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def decode(codes, scale_bits):
    """fp32 (ROWS, 64) of int8 codes (ROWS, 64) and bfloat16 bits (ROWS,)."""
    q = codes.to(tl.float32)
    return q / (LEVELS * (1 + SHARPNESS) - SHARPNESS * tl.abs(q)) * bf16_bits_to_float(scale_bits)[:, None]


@triton.jit
def encode(m):
    """int8 codes (ROWS, 64) and bfloat16 bits (ROWS,) of fp32 values (ROWS, 64)."""
    # The maximum of the bits is the maximum of the magnitudes, and NaN is the largest of all.
    largest = tl.max(m.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    finite = largest < 0x7F800000
    # Rounding up at the top of the range must not turn a finite block into an infinite one.
    rounded = tl.minimum(float_bits_to_bf16_bits(tl.where(finite, largest, 0)).to(tl.int32), 0x7F7F)
    infinite_or_nan = (largest >> 16) | tl.where(largest > 0x7F800000, 0x40, 0)
    scale_bits = tl.where(finite, rounded, infinite_or_nan).to(tl.int16)
    usable = (finite & (rounded > 0))[:, None]
    scale = tl.where(usable, bf16_bits_to_float(scale_bits)[:, None], 1.0)
    magnitude = tl.abs(m)
    # An eighth of everything: s + k|m| would overflow for |m| near the end of fp32.
    level = magnitude * (0.125 * (1 + SHARPNESS) * LEVELS) / (scale * 0.125 + magnitude * (0.125 * SHARPNESS))
    level = tl.where(usable, tl.minimum(level + 0.5, LEVELS), 0.0).to(tl.int32)  # truncation is ⌊·⌋ here
    return tl.where(m < 0, -level, level).to(tl.int8), scale_bits


@triton.jit
def quantize_kernel(x, codes, scale_bits, numel, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.load(x + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
    q, s = encode(values)
    tl.store(codes + offsets, q, mask=offsets < numel)
    tl.store(scale_bits + row, s, mask=row * BLOCK < numel)


@triton.jit
def dequantize_kernel(codes, scale_bits, out, numel, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    q = tl.load(codes + offsets, mask=offsets < numel, other=0)
    s = tl.load(scale_bits + row, mask=row * BLOCK < numel, other=0)
    tl.store(out + offsets, decode(q, s).to(out.dtype.element_ty), mask=offsets < numel)


def quantize_blockwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of `x`: int8 of the shape of `x`, and bfloat16 of shape (ceil(numel/64),).

    x: any shape, floating point, any strides; computed in fp32.
    """
    check_values(x)
    values = x.detach().contiguous()
    if values.dtype not in (torch.float32, torch.float16):
        values = values.float()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(scale_count(x.numel()), dtype=torch.bfloat16, device=x.device)
    if x.numel():
        grid = (triton.cdiv(len(scales), ROWS_A_PROGRAM),)
        quantize_kernel[grid](values, codes, scales.view(torch.int16), x.numel(), ROWS=ROWS_A_PROGRAM)
    return codes, scales


def dequantize_blockwise(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of `codes` (int8, any shape) and `scales` (bfloat16, (ceil(numel/64),)), in `dtype`."""
    check_codes(codes, scales)
    codes = codes.contiguous()
    kernel_dtype = dtype if dtype in (torch.float32, torch.float16) else torch.float32
    out = torch.empty(codes.shape, dtype=kernel_dtype, device=codes.device)
    if codes.numel():
        grid = (triton.cdiv(len(scales), ROWS_A_PROGRAM),)
        bits = scales.contiguous().view(torch.int16)
        dequantize_kernel[grid](codes, bits, out, codes.numel(), ROWS=ROWS_A_PROGRAM)
    return out.to(dtype)
