"""State codecs: how an optimizer's state is kept in fewer bits. `CODECS` maps `state_bits` to one object each.

8 bits, "softsign": a block of 64 consecutive values shares one scale `s`, its largest magnitude rounded to bfloat16;
each value keeps an int8 code `q`. With k = 3

    encode   q = sign(m) · ⌊127 · (1+k)|m| / (s + k|m|) + ½⌋          (at most 127)
    decode   m = s · q / (127 (1+k) - k|q|)

4 times finer than linear codes near 0, where a sign of Lion's update is decided, and 1/4 as fine at s. Chosen by
counting sign flips on recorded LoRA gradients (`cruxy-triton bench codec`); FlashOptim's softsign has k=1. bfloat16
scales keep fp32's range, so that tiny gradients live. 1 + 2/64 = 1.03125 bytes per value.

Blocks run over the flattened tensor and the last one may be short. A block that holds a non-finite value decodes
to NaN throughout; a block whose scale rounds to 0 (all |m| < 4.6e-41) decodes to 0.

A codec is added here: a specification in PyTorch, the same in Triton, and its line in CODECS.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._triton import HAS_TRITON

BLOCK = 64  # values per scale
SHARPNESS = 3  # k, as in native.cpp
LEVELS = 127  # codes on each side of 0


def encode_softsign(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (n, 64) and bfloat16 scales (n,) of fp32 blocks (n, 64)."""
    magnitude = blocks.abs()
    absmax = magnitude.amax(dim=1)
    scales = absmax.to(torch.bfloat16)
    # Rounding up at the top of the range must not turn a finite block into an infinite one.
    top = torch.finfo(torch.bfloat16).max
    scales = torch.where(absmax.isfinite() & scales.isinf(), top, scales)
    s = scales.float()[:, None]
    usable = (s > 0) & s.isfinite()
    # An eighth of everything, and the quotient before the product: neither overflows at the end of fp32.
    quotient = magnitude / (s * 0.125 + magnitude * (0.125 * SHARPNESS))
    level = (quotient * (0.125 * (1 + SHARPNESS) * LEVELS) + 0.5).floor_().clamp_(max=LEVELS)
    return torch.where(usable, level, 0.0).copysign_(blocks).to(torch.int8), scales


def decode_softsign(codes: Tensor, scales: Tensor) -> Tensor:
    """fp32 values (n, 64) of int8 codes (n, 64) and bfloat16 scales (n,)."""
    q = codes.float()
    return q / (LEVELS * (1 + SHARPNESS) - SHARPNESS * q.abs()) * scales.float()[:, None]


@dataclass(frozen=True)
class Codec:
    """One way to keep a state buffer. `block` is 0 for plain floating point, which has no scales.

    encode_blocks, decode_blocks: the specification: fp32 (n, block) <-> codes (n, block) and scales (n,).
    load, store: the same in Triton, as the update kernel calls them; None where Triton is not installed.
    """

    bits: int
    block: int
    dtype: torch.dtype  # of the codes
    scale_dtype: torch.dtype | None = None
    encode_blocks: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    decode_blocks: Callable[[Tensor, Tensor], Tensor] | None = None
    load: Any = field(default=None, compare=False)
    store: Any = field(default=None, compare=False)

    @property
    def bytes_per_value(self) -> float:
        scale = 0 if self.scale_dtype is None else self.scale_dtype.itemsize / self.block
        return self.bits / 8 + scale

    def scale_count(self, numel: int) -> int:
        """Number of scales for a tensor of `numel` elements; 0 without scales."""
        return -(-numel // self.block) if self.block else 0

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(codes of the shape of `x`, scales (scale_count(numel),)); computed in fp32."""
        assert self.encode_blocks is not None, "plain floating point has no codes"
        values = x.detach().reshape(-1).float()
        codes, scales = self.encode_blocks(self._blocks(values))
        return codes.view(-1)[: values.numel()].reshape(x.shape).clone(), scales

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """fp32 values of the shape of `codes`."""
        assert self.decode_blocks is not None, "plain floating point has no codes"
        values = self.decode_blocks(self._blocks(codes.reshape(-1)), scales).view(-1)
        return values[: codes.numel()].reshape(codes.shape)

    def _blocks(self, flat: Tensor) -> Tensor:
        return torch.nn.functional.pad(flat, (0, -flat.numel() % self.block)).view(-1, self.block)

    def check(self, codes: Tensor, scales: Tensor) -> None:
        """Raises TypeError or ValueError unless `codes` and `scales` can come from one `encode`."""
        if codes.dtype != self.dtype or scales.dtype != self.scale_dtype:
            raise TypeError(
                f"expected {self.dtype} codes and {self.scale_dtype} scales, got {codes.dtype} and {scales.dtype}"
            )
        count = self.scale_count(codes.numel())
        if scales.shape != (count,):
            raise ValueError(
                f"{codes.numel()} codes need scales of shape ({count},), got {tuple(scales.shape)}: codes and scales "
                "must come from the same quantize_blockwise call"
            )
        if scales.device != codes.device:
            raise ValueError(f"scales are on {scales.device} and codes on {codes.device}; move one to the other")


if HAS_TRITON:
    import triton
    import triton.language as tl

    from .storage import (
        bf16_bits_to_float,
        load_raw,
        load_values,
        store_nearest,
        store_raw,
    )

    _BLOCK = tl.constexpr(BLOCK)
    _SHARPNESS = tl.constexpr(float(SHARPNESS))
    _LEVELS = tl.constexpr(float(LEVELS))

    @triton.jit
    def decode_softsign_kernel(codes, scale_bits):
        """fp32 (LINES, 64) of int8 codes (LINES, 64) and bfloat16 bits (LINES,)."""
        q = codes.to(tl.float32)
        return q / (_LEVELS * (1 + _SHARPNESS) - _SHARPNESS * tl.abs(q)) * bf16_bits_to_float(scale_bits)[:, None]

    @triton.jit
    def encode_softsign_kernel(m):
        """(int8 codes (LINES, 64), bfloat16 bits (LINES,)) of fp32 (LINES, 64)."""
        # The largest bits are the largest magnitude, and NaN is above all.
        largest = tl.max(m.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        finite = largest < 0x7F800000
        nearest = tl.minimum((largest + 0x7FFF + ((largest >> 16) & 1)) >> 16, 0x7F7F)
        special = (largest >> 16) | tl.where(largest > 0x7F800000, 0x40, 0)  # NaN keeps a bit that says so
        scale_bits = tl.where(finite, nearest, special).to(tl.int16)
        usable = (finite & (nearest > 0))[:, None]
        scale = tl.where(usable, bf16_bits_to_float(scale_bits)[:, None], 1.0)
        magnitude = tl.abs(m)
        quotient = magnitude / (scale * 0.125 + magnitude * (0.125 * _SHARPNESS))
        level = quotient * (0.125 * (1 + _SHARPNESS) * _LEVELS) + 0.5
        level = tl.where(usable, tl.minimum(level, _LEVELS), 0.0).to(tl.int32)  # truncation is ⌊·⌋ here
        return tl.where(m < 0, -level, level).to(tl.int8), scale_bits

    @triton.jit
    def load_plain(
        address, scales, start, local, remaining, TYPE: tl.constexpr, LINES: tl.constexpr, MASKED: tl.constexpr
    ):
        """fp32 (LINES, 64) of a state kept as floating point of TYPE."""
        return load_values(address, start, local, remaining, TYPE, MASKED)

    @triton.jit
    def store_plain(
        address, scales, start, local, remaining, values, TYPE: tl.constexpr, LINES: tl.constexpr, MASKED: tl.constexpr
    ):
        store_nearest(address, start, local, remaining, values, TYPE, MASKED)

    @triton.jit
    def load_softsign(
        address, scales, start, local, remaining, TYPE: tl.constexpr, LINES: tl.constexpr, MASKED: tl.constexpr
    ):
        """fp32 (LINES, 64) of a state kept as int8 codes at `address` and bfloat16 scales at `scales`."""
        codes = load_raw(address, start, local, remaining, "int8", MASKED)
        line = tl.arange(0, LINES)
        bits = load_raw(scales, start // _BLOCK, line, tl.cdiv(remaining, _BLOCK), "bf16", MASKED)
        return decode_softsign_kernel(codes, bits)

    @triton.jit
    def store_softsign(
        address, scales, start, local, remaining, values, TYPE: tl.constexpr, LINES: tl.constexpr, MASKED: tl.constexpr
    ):
        codes, bits = encode_softsign_kernel(values)
        store_raw(address, start, local, remaining, codes, "int8", MASKED)
        line = tl.arange(0, LINES)
        store_raw(scales, start // _BLOCK, line, tl.cdiv(remaining, _BLOCK), bits, "bf16", MASKED)

    @triton.jit
    def quantize_kernel(x, codes, scales, numel, STORE: tl.constexpr, ALIGNED: tl.constexpr, LINES: tl.constexpr):
        """Codes and scales of `x`, a chunk per program. ALIGNED: every address is a multiple of 16."""
        start = tl.program_id(0).to(tl.int64) * (LINES * _BLOCK)
        local = tl.arange(0, LINES)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        remaining = tl.minimum(numel - start, LINES * _BLOCK).to(tl.int32)
        to_codes, to_scales = codes.to(tl.int64), scales.to(tl.int64)
        if ALIGNED & (remaining == LINES * _BLOCK):
            values = tl.load(x + start + local).to(tl.float32)
            STORE(to_codes, to_scales, start, local, remaining, values, "", LINES, False)
        else:
            values = tl.load(x + start + local, mask=local < remaining, other=0.0).to(tl.float32)
            STORE(to_codes, to_scales, start, local, remaining, values, "", LINES, True)

    @triton.jit
    def dequantize_kernel(codes, scales, out, numel, LOAD: tl.constexpr, ALIGNED: tl.constexpr, LINES: tl.constexpr):
        """The values of codes and scales, a chunk per program. ALIGNED: every address is a multiple of 16."""
        start = tl.program_id(0).to(tl.int64) * (LINES * _BLOCK)
        local = tl.arange(0, LINES)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        remaining = tl.minimum(numel - start, LINES * _BLOCK).to(tl.int32)
        from_codes, from_scales = codes.to(tl.int64), scales.to(tl.int64)
        if ALIGNED & (remaining == LINES * _BLOCK):
            values = LOAD(from_codes, from_scales, start, local, remaining, "", LINES, False)
            tl.store(out + start + local, values.to(out.dtype.element_ty))
        else:
            values = LOAD(from_codes, from_scales, start, local, remaining, "", LINES, True)
            tl.store(out + start + local, values.to(out.dtype.element_ty), mask=local < remaining)

    _PLAIN, _SOFTSIGN = (load_plain, store_plain), (load_softsign, store_softsign)
else:
    _PLAIN = _SOFTSIGN = (None, None)

CODECS = {
    32: Codec(32, 0, torch.float32, load=_PLAIN[0], store=_PLAIN[1]),
    8: Codec(8, BLOCK, torch.int8, torch.bfloat16, encode_softsign, decode_softsign, *_SOFTSIGN),
}


def scale_name(state: str) -> str:
    """Under which name the scales of a state buffer are kept."""
    return f"{state}_scale"


def codec_of(codes: Tensor) -> Codec:
    """The codec whose codes have this tensor's dtype; the plain one for floating point."""
    return next((c for c in CODECS.values() if c.block and c.dtype == codes.dtype), CODECS[32])
