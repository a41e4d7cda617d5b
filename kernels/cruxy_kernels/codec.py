"""State codecs: how an optimizer's state is kept in fewer bits. `CODECS` maps names to one object each.

A block of 64 consecutive values shares one scale `s`, its largest magnitude rounded to bfloat16; each value keeps a
code. A codec is a way to store a level between 0 and the scale; rules/ says which one a state buffer may have.

"softsign8", 1 + 2/64 = 1.03125 bytes per value: an int8 code `q`. With k = 3 and L = 127

    encode   q = sign(m) · ⌊x + ½⌋,   x = L (1+k)|m| / (s + k|m|)          (at most L)
    decode   m = s · q / (L (1+k) - k|q|)

4 times finer than linear codes near 0, where a sign of Lion's update is decided, and 1/4 as fine at s. Chosen by
counting sign flips on recorded LoRA gradients (`cruxy-triton bench codec`); FlashOptim's softsign has k=1.

"softsign4", 1/2 + 2/64 = 0.53125 bytes per value: the same with L = 7, two codes per byte, the first in the lower half,
each a two's complement of 4 bits; the half behind an odd length is 0. Rounded stochastically: of the two levels around
it a value takes the upper one with the probability that is right on average *in value*, so that what a step adds to a
momentum arrives though it is less than the distance of two codes. Without random bits it takes the nearest one.

"quartic8", 1.03125 bytes per value, for values of at least 0 (AdamW's second moment): a uint8 code `q`, rounded
stochastically and right on average in value like softsign4's,

    encode   q = ⌊x⌋ or ⌊x⌋ + 1,   x = 255 (v / s)^¼         (at least 1 where v > 0)
    decode   v = s (q / 255)^4

Its root, by which AdamW divides, keeps a relative precision of 2/q down to s / 255². No value above 0 becomes 0: the
step would be as large as the momentum over eps. Drawn and not rounded to the nearest, because a step changes v by
a thousandth of it and codes are further apart than that.

bfloat16 scales keep fp32's range, so that tiny gradients live. Blocks run over the flattened tensor and the last one
may be short. A block that holds a non-finite value decodes to NaN throughout; a block whose scale rounds to 0 (all
|m| < 4.6e-41) decodes to 0. A code whose bits are all 0 is 0.

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
LEVELS_4 = 7  # the same of 4 bits
LEVELS_ROOT = 255  # codes above 0 of the second moment


def block_scales(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 scales (n,) of fp32 blocks (n, 64); the same as fp32 (n, 1), and which of them can divide."""
    absmax = blocks.abs().amax(dim=1)
    scales = absmax.to(torch.bfloat16)
    # Rounding up at the top of the range must not turn a finite block into an infinite one.
    top = torch.finfo(torch.bfloat16).max
    scales = torch.where(absmax.isfinite() & scales.isinf(), top, scales)
    s = scales.float()[:, None]
    return scales, s, (s > 0) & s.isfinite()


def softsign_level(magnitude: Tensor, s: Tensor, levels: int) -> Tensor:
    """x of the module's docstring."""
    # An eighth of everything, and the quotient before the product: neither overflows at the end of fp32.
    quotient = magnitude / (s * 0.125 + magnitude * (0.125 * SHARPNESS))
    return quotient * (0.125 * (1 + SHARPNESS) * levels)


def softsign_value(q: Tensor, scales: Tensor, levels: int) -> Tensor:
    """fp32 values of fp32 codes (n, 64)."""
    return q / (levels * (1 + SHARPNESS) - SHARPNESS * q.abs()) * scales.float()[:, None]


def thresholds(random: Tensor | None) -> Tensor | float:
    """What a chance has to exceed: in (0, 1] from the upper half of int32 bits; ½ without them."""
    return 0.5 if random is None else (((random >> 16) & 0xFFFF) + 1).float() * 2.0**-16


def encode_softsign(blocks: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 codes (n, 64) and bfloat16 scales (n,) of fp32 blocks (n, 64), rounded to the nearest code."""
    scales, s, usable = block_scales(blocks)
    level = (softsign_level(blocks.abs(), s, LEVELS) + 0.5).floor_().clamp_(max=LEVELS)
    return torch.where(usable, level, 0.0).copysign_(blocks).to(torch.int8), scales


def decode_softsign(codes: Tensor, scales: Tensor) -> Tensor:
    """fp32 values (n, 64) of int8 codes (n, 64) and bfloat16 scales (n,)."""
    return softsign_value(codes.float(), scales, LEVELS)


def encode_softsign4(blocks: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """uint8 pairs of codes (n, 32) and bfloat16 scales (n,) of fp32 blocks (n, 64)."""
    scales, s, usable = block_scales(blocks)
    exact = softsign_level(blocks.abs(), s, LEVELS_4)
    low = exact.floor().clamp_(max=LEVELS_4 - 1)
    # With a = L (1+k) the values of the levels are s l / (a - k l). So (value - lower one) / (upper one - lower one)
    # is (exact - low) (a - k (low + 1)) / (a - k exact).
    a = LEVELS_4 * (1 + SHARPNESS)
    chance, whole = (exact - low) * (a - SHARPNESS - SHARPNESS * low), a - SHARPNESS * exact
    level = torch.where(usable, low + (chance > thresholds(random) * whole), 0.0)
    q = level.copysign_(blocks).to(torch.int32) & 15
    return (q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8), scales


def decode_softsign4(codes: Tensor, scales: Tensor) -> Tensor:
    """fp32 values (n, 64) of uint8 pairs of codes (n, 32) and bfloat16 scales (n,)."""
    pairs = codes.to(torch.int32)
    q = torch.stack((pairs & 15, pairs >> 4), dim=2).view(len(codes), 2 * codes.shape[1])
    return softsign_value((q - ((q & 8) << 1)).float(), scales, LEVELS_4)


def encode_quartic(blocks: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """uint8 codes (n, 64) and bfloat16 scales (n,) of fp32 blocks (n, 64) of values of at least 0."""
    scales, s, usable = block_scales(blocks)
    part = blocks / s
    low = (part.sqrt().sqrt_() * LEVELS_ROOT).floor_().clamp_(max=LEVELS_ROOT - 1)
    square = low * low
    # What lies above (l / 255)⁴, and the distance of the two levels, times 255⁴.
    chance, whole = part * LEVELS_ROOT**4 - square * square, (2 * low + 1) * (2 * square + 2 * low + 1)
    level = (low + (chance > thresholds(random) * whole)).clamp_(min=1)
    return torch.where(usable & (blocks > 0), level, 0.0).to(torch.uint8), scales


def decode_quartic(codes: Tensor, scales: Tensor) -> Tensor:
    """fp32 values (n, 64) of uint8 codes (n, 64) and bfloat16 scales (n,)."""
    return codes.float().square_().square_() * LEVELS_ROOT**-4 * scales.float()[:, None]


@dataclass(frozen=True)
class Codec:
    """One way to keep a state buffer. `block` is 0 for plain floating point, which has no scales.

    encode_blocks, decode_blocks: the specification: fp32 (n, block) <-> codes (n, block / packed) and scales (n,).
        Encoding takes int32 random bits (n, block) or None.
    random: whether the encoding of an update gets random bits.
    load, store: the same in Triton, as the update kernel calls them; None where Triton is not installed.
    """

    name: str
    bits: int
    block: int
    dtype: torch.dtype  # of the codes
    scale_dtype: torch.dtype | None = None
    encode_blocks: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]] | None = None
    decode_blocks: Callable[[Tensor, Tensor], Tensor] | None = None
    load: Any = field(default=None, compare=False)
    store: Any = field(default=None, compare=False)
    random: bool = False

    @property
    def packed(self) -> int:
        """Values per element of the codes' tensor."""
        return 8 * self.dtype.itemsize // self.bits

    @property
    def bytes_per_value(self) -> float:
        scale = 0 if self.scale_dtype is None else self.scale_dtype.itemsize / self.block
        return self.bits / 8 + scale

    def scale_count(self, numel: int) -> int:
        """Number of scales for a tensor of `numel` elements; 0 without scales."""
        return -(-numel // self.block) if self.block else 0

    def shape(self, shape: torch.Size) -> torch.Size:
        """Of the codes of a tensor of `shape`: its own, or flat where several share an element."""
        return shape if self.packed == 1 else torch.Size([-(-shape.numel() // self.packed)])

    def encode(self, x: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(codes, scales (scale_count(numel),)) of `x`; computed in fp32. random: int32 of the shape of `x`."""
        assert self.encode_blocks is not None, "plain floating point has no codes"
        values = x.detach().reshape(-1).float()
        bits = None if random is None else self._blocks(random.reshape(-1))
        codes, scales = self.encode_blocks(self._blocks(values), bits)
        shape = self.shape(x.shape)
        return codes.view(-1)[: shape.numel()].reshape(shape).clone(), scales

    def decode(self, codes: Tensor, scales: Tensor, shape: torch.Size | None = None) -> Tensor:
        """fp32 values; `shape` is that of the tensor, without it that of the codes, flat where they are packed."""
        assert self.decode_blocks is not None, "plain floating point has no codes"
        if shape is None:
            shape = codes.shape if self.packed == 1 else torch.Size([codes.numel() * self.packed])
        rows = self._blocks(codes.reshape(-1), self.packed)
        return self.decode_blocks(rows, scales).view(-1)[: shape.numel()].reshape(shape)

    def _blocks(self, flat: Tensor, packed: int = 1) -> Tensor:
        unit = self.block // packed
        return torch.nn.functional.pad(flat, (0, -flat.numel() % unit)).view(-1, unit)

    def check(self, codes: Tensor, scales: Tensor, shape: torch.Size | None = None) -> None:
        """Raises TypeError or ValueError unless `codes` and `scales` can come from one `encode`, of a `shape`."""
        if codes.dtype != self.dtype or scales.dtype != self.scale_dtype:
            raise TypeError(
                f"expected {self.dtype} codes and {self.scale_dtype} scales, got {codes.dtype} and {scales.dtype}"
            )
        if shape is not None and codes.shape != self.shape(shape):
            raise ValueError(
                f"codes of {self.bits} bits of a tensor of shape {tuple(shape)} have shape "
                f"{tuple(self.shape(shape))}, got {tuple(codes.shape)}"
            )
        count = self.scale_count(codes.numel() * self.packed)
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
    _LEVELS_4 = tl.constexpr(float(LEVELS_4))
    _LEVELS_ROOT, _TOP = tl.constexpr(float(LEVELS_ROOT)), tl.constexpr(float(LEVELS_ROOT) ** 4)

    @triton.jit
    def softsign_value_kernel(q, scale_bits, LEVELS: tl.constexpr):
        """fp32 (LINES, 64) of fp32 codes (LINES, 64) and bfloat16 bits (LINES,)."""
        return q / (LEVELS * (1 + _SHARPNESS) - _SHARPNESS * tl.abs(q)) * bf16_bits_to_float(scale_bits)[:, None]

    @triton.jit
    def block_scales_kernel(m):
        """(bfloat16 bits (LINES,), fp32 scales (LINES, 1), which can divide) of fp32 (LINES, 64)."""
        # The largest bits are the largest magnitude, and NaN is above all.
        largest = tl.max(m.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        finite = largest < 0x7F800000
        nearest = tl.minimum((largest + 0x7FFF + ((largest >> 16) & 1)) >> 16, 0x7F7F)
        special = (largest >> 16) | tl.where(largest > 0x7F800000, 0x40, 0)  # NaN keeps a bit that says so
        scale_bits = tl.where(finite, nearest, special).to(tl.int16)
        usable = (finite & (nearest > 0))[:, None]
        scale = tl.where(usable, bf16_bits_to_float(scale_bits)[:, None], 1.0)
        return scale_bits, scale, usable

    @triton.jit
    def softsign_level_kernel(m, scale, LEVELS: tl.constexpr):
        magnitude = tl.abs(m)
        quotient = magnitude / (scale * 0.125 + magnitude * (0.125 * _SHARPNESS))
        return quotient * (0.125 * (1 + _SHARPNESS) * LEVELS)

    @triton.jit
    def threshold_kernel(random):
        """What a chance has to exceed, in (0, 1], from the upper half of uint32 bits."""
        return ((random >> 16).to(tl.int32) + 1).to(tl.float32) * 0.0000152587890625

    @triton.jit
    def load_plain(
        address, scales, start, local, remaining, TYPE: tl.constexpr, LINES: tl.constexpr, MASKED: tl.constexpr
    ):
        """fp32 (LINES, 64) of a state kept as floating point of TYPE."""
        return load_values(address, start, local, remaining, TYPE, MASKED)

    @triton.jit
    def store_plain(
        address, scales, start, local, remaining, values, random, TYPE: tl.constexpr, LINES: tl.constexpr,
        MASKED: tl.constexpr,
    ):  # fmt: skip
        store_nearest(address, start, local, remaining, values, TYPE, MASKED)

    @triton.jit
    def load_scales(scales, start, remaining, LINES: tl.constexpr, MASKED: tl.constexpr):
        """bfloat16 bits (LINES,) of a chunk's blocks."""
        return load_raw(scales, start // _BLOCK, tl.arange(0, LINES), tl.cdiv(remaining, _BLOCK), "bf16", MASKED)

    @triton.jit
    def store_scales(scales, start, remaining, bits, LINES: tl.constexpr, MASKED: tl.constexpr):
        store_raw(scales, start // _BLOCK, tl.arange(0, LINES), tl.cdiv(remaining, _BLOCK), bits, "bf16", MASKED)

    @triton.jit
    def load_softsign(
        address, scales, start, local, remaining, TYPE: tl.constexpr, LINES: tl.constexpr, MASKED: tl.constexpr
    ):
        """fp32 (LINES, 64) of a state kept as int8 codes at `address` and bfloat16 scales at `scales`."""
        codes = load_raw(address, start, local, remaining, "int8", MASKED)
        bits = load_scales(scales, start, remaining, LINES, MASKED)
        return softsign_value_kernel(codes.to(tl.float32), bits, _LEVELS)

    @triton.jit
    def store_softsign(
        address, scales, start, local, remaining, values, random, TYPE: tl.constexpr, LINES: tl.constexpr,
        MASKED: tl.constexpr,
    ):  # fmt: skip
        bits, scale, usable = block_scales_kernel(values)
        level = softsign_level_kernel(values, scale, _LEVELS) + 0.5
        level = tl.where(usable, tl.minimum(level, _LEVELS), 0.0).to(tl.int32)  # truncation is ⌊·⌋ here
        codes = tl.where(values < 0, -level, level).to(tl.int8)
        store_raw(address, start, local, remaining, codes, "int8", MASKED)
        store_scales(scales, start, remaining, bits, LINES, MASKED)

    @triton.jit
    def load_softsign4(
        address, scales, start, local, remaining, TYPE: tl.constexpr, LINES: tl.constexpr, MASKED: tl.constexpr
    ):
        """fp32 (LINES, 64) of a state kept as pairs of 4-bit codes at `address` and bfloat16 scales at `scales`."""
        pair = tl.arange(0, LINES)[:, None] * (_BLOCK // 2) + tl.arange(0, _BLOCK // 2)[None, :]
        pairs = load_raw(address, start // 2, pair, (remaining + 1) // 2, "int8", MASKED).to(tl.int32)
        q = tl.reshape(tl.join((pairs << 28) >> 28, pairs >> 4), (LINES, _BLOCK))  # with their signs
        return softsign_value_kernel(q.to(tl.float32), load_scales(scales, start, remaining, LINES, MASKED), _LEVELS_4)

    @triton.jit
    def store_softsign4(
        address, scales, start, local, remaining, values, random, TYPE: tl.constexpr, LINES: tl.constexpr,
        MASKED: tl.constexpr,
    ):  # fmt: skip
        bits, scale, usable = block_scales_kernel(values)
        exact = softsign_level_kernel(values, scale, _LEVELS_4)
        low = tl.minimum(tl.floor(exact), _LEVELS_4 - 1)
        chance = (exact - low) * (_LEVELS_4 * (1 + _SHARPNESS) - _SHARPNESS - _SHARPNESS * low)
        whole = _LEVELS_4 * (1 + _SHARPNESS) - _SHARPNESS * exact
        level = tl.where(usable, low + tl.where(chance > threshold_kernel(random) * whole, 1.0, 0.0), 0.0).to(tl.int32)
        q = tl.where(values < 0, -level, level)
        first, second = tl.split(tl.reshape(q, (LINES, _BLOCK // 2, 2)))
        pair = tl.arange(0, LINES)[:, None] * (_BLOCK // 2) + tl.arange(0, _BLOCK // 2)[None, :]
        pairs = ((first & 15) | (second << 4)).to(tl.int8)
        store_raw(address, start // 2, pair, (remaining + 1) // 2, pairs, "int8", MASKED)
        store_scales(scales, start, remaining, bits, LINES, MASKED)

    @triton.jit
    def load_quartic(
        address, scales, start, local, remaining, TYPE: tl.constexpr, LINES: tl.constexpr, MASKED: tl.constexpr
    ):
        """fp32 (LINES, 64) of a state kept as uint8 codes at `address` and bfloat16 scales at `scales`."""
        codes = load_raw(address, start, local, remaining, "uint8", MASKED).to(tl.int32) & 255
        square = codes.to(tl.float32) * codes.to(tl.float32)
        bits = load_scales(scales, start, remaining, LINES, MASKED)
        return square * square * (1 / _TOP) * bf16_bits_to_float(bits)[:, None]

    @triton.jit
    def store_quartic(
        address, scales, start, local, remaining, values, random, TYPE: tl.constexpr, LINES: tl.constexpr,
        MASKED: tl.constexpr,
    ):  # fmt: skip
        bits, scale, usable = block_scales_kernel(values)
        part = values / scale
        low = tl.minimum(tl.floor(tl.sqrt(tl.sqrt(part)) * _LEVELS_ROOT), _LEVELS_ROOT - 1)
        square = low * low
        chance = part * _TOP - square * square
        whole = (2 * low + 1) * (2 * square + 2 * low + 1)
        level = tl.maximum(low + tl.where(chance > threshold_kernel(random) * whole, 1.0, 0.0), 1.0)
        codes = tl.where(usable & (values > 0), level, 0.0).to(tl.int32).to(tl.int8)
        store_raw(address, start, local, remaining, codes, "uint8", MASKED)
        store_scales(scales, start, remaining, bits, LINES, MASKED)

    @triton.jit
    def quantize_kernel(x, codes, scales, numel, STORE: tl.constexpr, ALIGNED: tl.constexpr, LINES: tl.constexpr):
        """Codes and scales of `x`, a chunk per program. ALIGNED: every address is a multiple of 16."""
        start = tl.program_id(0).to(tl.int64) * (LINES * _BLOCK)
        local = tl.arange(0, LINES)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        remaining = tl.minimum(numel - start, LINES * _BLOCK).to(tl.int32)
        to_codes, to_scales = codes.to(tl.int64), scales.to(tl.int64)
        even = tl.full((1, 1), 0x7FFF0000, tl.uint32)  # the bits with which a random rounding takes the nearest value
        if ALIGNED & (remaining == LINES * _BLOCK):
            values = tl.load(x + start + local).to(tl.float32)
            STORE(to_codes, to_scales, start, local, remaining, values, even, "", LINES, False)
        else:
            values = tl.load(x + start + local, mask=local < remaining, other=0.0).to(tl.float32)
            STORE(to_codes, to_scales, start, local, remaining, values, even, "", LINES, True)

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
    _SOFTSIGN4, _QUARTIC = (load_softsign4, store_softsign4), (load_quartic, store_quartic)
else:
    _PLAIN = _SOFTSIGN = _SOFTSIGN4 = _QUARTIC = (None, None)

PLAIN = Codec("plain", 32, 0, torch.float32, load=_PLAIN[0], store=_PLAIN[1])
CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        PLAIN,
        Codec("softsign8", 8, BLOCK, torch.int8, torch.bfloat16, encode_softsign, decode_softsign, *_SOFTSIGN),
        Codec("softsign4", 4, BLOCK, torch.uint8, torch.bfloat16, encode_softsign4, decode_softsign4, *_SOFTSIGN4,
              random=True),
        Codec("quartic8", 8, BLOCK, torch.uint8, torch.bfloat16, encode_quartic, decode_quartic, *_QUARTIC,
              random=True),
    )
}  # fmt: skip


def scale_name(state: str) -> str:
    """Under which name the scales of a state buffer are kept."""
    return f"{state}_scale"
