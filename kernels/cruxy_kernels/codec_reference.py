"""The 8-bit momentum codec in plain PyTorch: the oracle of codec.py, and the path where Triton does not run.

A block of 64 consecutive values shares one scale `s`, its largest magnitude rounded to bfloat16; each value
keeps an int8 code `q`. With k = 3

    encode   q = sign(m) · ⌊127 · (1+k)|m| / (s + k|m|) + ½⌋          (at most 127)
    decode   m = s · q / (127 (1+k) - k|q|)

a softsign: 4 times finer than linear codes near 0, where a sign of Lion's update is decided, and 1/4 as fine
at s. Chosen by counting sign flips on recorded LoRA gradients (`cruxy-triton bench codec`); FlashOptim's
softsign has k=1. 1 + 2/64 = 1.03125 bytes a value. bfloat16 scales keep fp32's range, so that tiny gradients live.

Blocks run over the flattened tensor and the last one may be short. A block that holds a non-finite value
decodes to NaN throughout; a block whose scale rounds to 0 (all |m| < 4.6e-41) decodes to 0.
"""

import torch
from torch import Tensor

BLOCK = 64  # values a scale
SHARPNESS = 3  # k, as in native.cpp
LEVELS = 127  # codes on each side of 0


def scale_count(numel: int) -> int:
    """Number of scales for a tensor of `numel` elements."""
    return -(-numel // BLOCK)


def quantize_blockwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of `x`: int8 of the shape of `x`, and bfloat16 of shape (ceil(numel/64),).

    x: any shape, floating point, any strides; computed in fp32.
    """
    check_values(x)
    values = x.detach().reshape(-1).float()
    rows = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    codes, scales = encode_rows(rows)
    return codes.view(-1)[: values.numel()].reshape(x.shape).clone(), scales


def dequantize_blockwise(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of `codes` (int8, any shape) and `scales` (bfloat16, (ceil(numel/64),)), in `dtype`."""
    check_codes(codes, scales)
    flat = codes.reshape(-1)
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    return decode_rows(rows, scales).view(-1)[: flat.numel()].reshape(codes.shape).to(dtype)


def encode_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (n, 64) and bfloat16 scales (n,) of fp32 rows (n, 64)."""
    magnitude = rows.abs()
    absmax = magnitude.amax(dim=1)
    scales = absmax.to(torch.bfloat16)
    # Rounding up at the top of the range must not turn a finite block into an infinite one.
    top = torch.finfo(torch.bfloat16).max
    scales = torch.where(absmax.isfinite() & scales.isinf(), top, scales)
    s = scales.float()[:, None]
    usable = (s > 0) & s.isfinite()
    # An eighth of everything: s + k|m| would overflow for |m| near the end of fp32.
    level = magnitude * (0.125 * (1 + SHARPNESS) * LEVELS) / (s * 0.125 + magnitude * (0.125 * SHARPNESS))
    level = torch.where(usable, (level + 0.5).floor_().clamp_(max=LEVELS), 0.0)
    return level.copysign_(rows).to(torch.int8), scales


def decode_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """fp32 values (n, 64) of int8 codes (n, 64) and bfloat16 scales (n,)."""
    q = codes.float()
    return q / (LEVELS * (1 + SHARPNESS) - SHARPNESS * q.abs()) * scales.float()[:, None]


def check_values(x: Tensor) -> None:
    """Raises TypeError unless `x` is floating point."""
    if not x.is_floating_point():
        raise TypeError(f"quantize_blockwise expects a floating-point tensor, got {x.dtype}")


def check_codes(codes: Tensor, scales: Tensor) -> None:
    """Raises TypeError or ValueError unless `codes` and `scales` come from one quantize_blockwise."""
    if codes.dtype != torch.int8 or scales.dtype != torch.bfloat16:
        raise TypeError(f"expected int8 codes and bfloat16 scales, got {codes.dtype} and {scales.dtype}")
    if scales.shape != (scale_count(codes.numel()),):
        raise ValueError(
            f"{codes.numel()} codes need scales of shape ({scale_count(codes.numel())},), "
            f"got {tuple(scales.shape)}: codes and scales must come from the same quantize_blockwise call"
        )
