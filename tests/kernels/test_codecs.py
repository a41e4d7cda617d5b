"""Every codec on every backend against its formula in float64 (codecs/*.py), and what a codec has to keep to."""

import math
import struct

import numpy as np
import pytest
import torch
from cases import CODEC_CASES, wide
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cruxy_kernels import CODECS, dequantize_blockwise, lion_update_, quantize_blockwise

SIZES = (0, 1, 63, 64, 65, 127, 128, 129, 1024, 2048, 65537)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_codec = pytest.mark.parametrize("bits", CODEC_CASES)


def spread(x, seed=0):
    """Values of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x, generator=generator) * torch.exp(2 * torch.randn(x, generator=generator))


def check(bits, x, codes, scales):
    """Codes and scales are those of the formula; a value on the border between two codes may take either."""
    case, codec = CODEC_CASES[bits], CODECS[bits]
    assert (codes.dtype, scales.dtype) == (codec.dtype, codec.scale_dtype)
    assert codes.shape == x.shape
    assert scales.shape == (-(-x.numel() // codec.block),)
    values, codes = wide(x).reshape(-1), wide(codes).reshape(-1)
    blocks = np.pad(np.abs(values), (0, -values.size % codec.block)).reshape(-1, codec.block)
    largest = np.where(np.isfinite(blocks).all(1), blocks.max(1, initial=0), np.nan)
    found, wanted = wide(scales), case.scale(largest)
    np.testing.assert_array_equal(np.where(np.isfinite(found), found, np.nan), wanted)
    s = np.repeat(wanted, codec.block)[: values.size]
    usable = np.isfinite(s) & (s > 0)
    assert (codes[~usable] == 0).all()
    codes, values, s = codes[usable], values[usable], s[usable]
    assert (np.abs(np.minimum(case.level(values, s), 127) - np.abs(codes)) <= 0.5 + 1e-4).all()
    assert (codes * np.sign(values) >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@each_codec
def test_codes_are_those_of_the_formula(place, bits, size, dtype):
    x = spread(size, size).to(place.device, dtype)
    codes, scales = quantize_blockwise(x, bits=bits, backend=place.backend)
    check(bits, x, codes, scales)
    back = dequantize_blockwise(codes, scales, dtype, backend=place.backend)
    assert back.dtype == dtype
    assert back.shape == x.shape
    s = wide(scales).repeat(CODECS[bits].block)[:size]
    np.testing.assert_allclose(
        wide(back), CODEC_CASES[bits].value(wide(codes), s), rtol=max(3e-7, torch.finfo(dtype).eps / 2), atol=1e-7
    )


@each_codec
def test_the_end_of_the_range(place, bits):
    """1e37 beside 3e38 keeps its code: nothing in between may overflow, at either end of fp32."""
    for top in (3.4028235e38, 3.39e38, 3e38, 1e37, 1.0, 1e-37, 1e-39, 1e-40):
        x = torch.tensor([top * f for f in (1, 1 / 30, -0.5, 1e-3, -0.01, 0.2, 0)] * 10, dtype=torch.float32)
        codes, scales = quantize_blockwise(x.to(place.device), bits=bits, backend=place.backend)
        check(bits, x, codes, scales)
        back = wide(dequantize_blockwise(codes, scales, backend=place.backend))
        s = wide(scales).repeat(CODECS[bits].block)[:70]
        assert (np.abs(back - wide(x)) <= CODEC_CASES[bits].error(wide(x), s) + 2e-45).all()


any_float = st.one_of(
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4028235e38, -3.39e38, 1e37, 1e-45, -1e-40, 65504.0]),
    st.integers(0, 2**32 - 1).map(lambda bits: struct.unpack("f", struct.pack("I", bits))[0]),
    st.floats(width=32, min_value=-10, max_value=10),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(any_float, min_size=1, max_size=70))
@each_codec
def test_any_values(place, bits, values):
    x = torch.tensor(values, dtype=torch.float32, device=place.device)
    case, block = CODEC_CASES[bits], CODECS[bits].block
    codes, scales = quantize_blockwise(x, bits=bits, backend=place.backend)
    check(bits, x, codes, scales)
    back = wide(dequantize_blockwise(codes, scales, backend=place.backend))
    for i, start in enumerate(range(0, len(values), block)):
        part, result = wide(x)[start : start + block], back[start : start + block]
        if not np.isfinite(part).all():
            assert not np.isfinite(result).any()
            continue
        s = wide(scales)[i]
        bound = case.error(part, s) if s else case.LIMIT
        assert (np.abs(result - part) <= bound + 2e-45).all()
        assert (result * part >= 0).all()


@each_codec
def test_every_not_finite_pattern_marks_its_block(place, bits):
    block = CODECS[bits].block
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, -8388607, 0x7F800000, -8388608], dtype=torch.int32)
    x = torch.ones(len(patterns) + 1, block)
    x.view(torch.int32)[:-1, 3] = patterns
    x = x.to(place.device)
    codes, scales = quantize_blockwise(x, bits=bits, backend=place.backend)
    back = dequantize_blockwise(codes, scales, backend=place.backend)
    assert not back[:-1].isfinite().any()
    torch.testing.assert_close(back[-1].cpu(), torch.ones(block))


@each_codec
def test_bytes_per_value(bits):
    codes, scales = CODECS[bits].encode(torch.randn(1 << 16))
    assert (codes.nbytes + scales.nbytes) / codes.numel() == CODECS[bits].bytes_per_value
    assert CODECS[bits].bytes_per_value == CODEC_CASES[bits].BYTES_PER_VALUE
    assert CODECS[bits].scale_count(129) == -(-129 // CODECS[bits].block)
    assert CODECS[32].bytes_per_value == 4
    assert CODECS[32].scale_count(129) == 0


@each_codec
def test_storing_twice_changes_nothing(place, bits):
    """Decoded values are fixed points but for the largest of a block, whose scale is rounded."""
    x = torch.randn(4096).to(place.device)
    codes, scales = quantize_blockwise(x, bits=bits, backend=place.backend)
    back = dequantize_blockwise(codes, scales, backend=place.backend)
    again, scales_again = quantize_blockwise(back, bits=bits, backend=place.backend)
    assert (codes.int() - again.int()).abs().max() <= 1
    torch.testing.assert_close(scales.float(), scales_again.float(), rtol=0.02, atol=0)


@each_codec
def test_tiny_gradients_survive(place, bits):
    x = (torch.randn(640) * 1e-12).to(place.device)  # fp16 scales hold nothing below 6e-8
    codes, scales = quantize_blockwise(x, bits=bits, backend=place.backend)
    back = dequantize_blockwise(codes, scales, backend=place.backend)
    assert (back - x).abs().max() < 0.03 * x.abs().max()


@each_codec
def test_strides_offsets_and_guards(place, bits):
    """A transposed tensor and one off the 16-byte boundary are coded as their values, and codes may be strided."""
    base = spread(3000).to(place.device)
    for x in (base[:1200].view(30, 40).t(), base[1:1090], base[::2], base[5], base[3:3]):
        codes, scales = quantize_blockwise(x, bits=bits, backend=place.backend)
        check(bits, x, codes, scales)
        back = dequantize_blockwise(codes, scales, backend=place.backend)
        odd = torch.zeros((2, *codes.shape), dtype=codes.dtype, device=codes.device)
        odd[1] = codes
        assert torch.equal(dequantize_blockwise(odd[1], scales, backend=place.backend), back)
        spaced = torch.stack([scales, scales], 1)[:, 0]
        assert torch.equal(dequantize_blockwise(codes, spaced, backend=place.backend), back)


def test_the_update_stores_the_same_codes(place, control_rows):
    """With beta2 = 0 and no clipping the momentum that Lion stores is the code of the gradient itself."""
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3.39e38, -1.0, math.inf, math.nan])
    ends = torch.tensor([3e38, 1e37, -1e38, 1e35] * 16)
    g = torch.cat([spread(640), spread(640, 1) * 1e-30, special.repeat_interleave(64), ends, special]).to(place.device)
    codes = torch.zeros(g.numel(), dtype=torch.int8, device=place.device)
    scales = torch.zeros(-(-g.numel() // 64), dtype=torch.bfloat16, device=place.device)
    control = control_rows(device=place.device, BETA2_OUT=0.0, GRAD_FACTOR=1.0)
    lion_update_([torch.zeros_like(g)], [g], [codes], control, exp_avg_scales=[scales], backend=place.backend)
    check(8, g, codes, scales)
    wanted, wanted_scales = quantize_blockwise(g, backend="torch")
    assert (codes.int() - wanted.int()).abs().max() <= (0 if place.device == "cpu" else 1)
    assert torch.equal(scales.nan_to_num(7, 8, 9), wanted_scales.nan_to_num(7, 8, 9))
