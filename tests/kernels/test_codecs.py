"""Every codec on every backend against its formula in float64 (codecs/*.py), and what a codec has to keep to."""

import math
import struct

import numpy as np
import pytest
import torch
from cases import CODEC_CASES, draws, row_values, wide
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cruxy_kernels import CODECS, RULES, dequantize_blockwise, lion_update_, quantize_blockwise

SIZES = (0, 1, 63, 64, 65, 127, 128, 129, 1024, 2048, 65537)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_codec = pytest.mark.parametrize("codec", CODEC_CASES)


def spread(x, seed=0, codec="softsign8"):
    """Values of many magnitudes, of those that the codec is for."""
    generator = torch.Generator().manual_seed(seed)
    return kept(codec, torch.randn(x, generator=generator) * torch.exp(2 * torch.randn(x, generator=generator)))


def kept(codec, values):
    return values if getattr(CODEC_CASES[codec], "SIGNED", True) else values.abs()


def check(codec, x, stored, scales, random=None):
    """Codes and scales are those of the formula; a value on the border between two codes may take either."""
    case, used = CODEC_CASES[codec], CODECS[codec]
    assert (stored.dtype, scales.dtype) == (used.dtype, used.scale_dtype)
    assert stored.shape == (x.shape if used.packed == 1 else (-(-x.numel() // used.packed),))
    assert scales.shape == (-(-x.numel() // used.block),)
    values, bytes_ = wide(x).reshape(-1), wide(stored).reshape(-1)
    blocks = np.pad(np.abs(values), (0, -values.size % used.block)).reshape(-1, used.block)
    largest = np.where(np.isfinite(blocks).all(1), blocks.max(1, initial=0), np.nan)
    found, wanted = wide(scales), case.scale(largest)
    np.testing.assert_array_equal(np.where(np.isfinite(found), found, np.nan), wanted)
    s = np.repeat(wanted, used.block)[: values.size]
    usable = np.isfinite(s) & (s > 0)
    codes = case.unpack(bytes_, values.size)
    assert (case.unpack(bytes_, bytes_.size * used.packed)[values.size :] == 0).all(), "the half behind the end"
    assert (codes[~usable] == 0).all()
    codes, values, s = codes[usable], values[usable], s[usable]
    low, high = case.codes(np.abs(values), s, None if random is None else random[usable])
    assert ((low <= np.abs(codes)) & (np.abs(codes) <= high)).all()
    assert (codes * np.sign(values) >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@each_codec
def test_codes_are_those_of_the_formula(place, codec, size, dtype):
    x = spread(size, size, codec).to(place.device, dtype)
    codes, scales = quantize_blockwise(x, codec=codec, backend=place.backend)
    check(codec, x, codes, scales)
    back = dequantize_blockwise(codes, scales, dtype, codec=codec, shape=x.shape, backend=place.backend)
    assert back.dtype == dtype
    assert back.shape == x.shape
    case, s = CODEC_CASES[codec], wide(scales).repeat(CODECS[codec].block)[:size]
    exact = case.value(case.unpack(wide(codes).reshape(-1), size), s)
    np.testing.assert_allclose(wide(back), exact, rtol=max(3e-7, torch.finfo(dtype).eps / 2), atol=1e-7)


@each_codec
def test_the_end_of_the_range(place, codec):
    """1e37 beside 3e38 keeps its code: nothing in between may overflow, at either end of fp32."""
    for top in (3.4028235e38, 3.39e38, 3e38, 1e37, 1.0, 1e-37, 1e-39, 1e-40):
        x = torch.tensor([top * f for f in (1, 1 / 30, -0.5, 1e-3, -0.01, 0.2, 0)] * 10, dtype=torch.float32)
        x = kept(codec, x)
        codes, scales = quantize_blockwise(x.to(place.device), codec=codec, backend=place.backend)
        check(codec, x, codes, scales)
        back = wide(dequantize_blockwise(codes, scales, codec=codec, shape=x.shape, backend=place.backend))
        s = wide(scales).repeat(CODECS[codec].block)[:70]
        assert (np.abs(back - wide(x)) <= CODEC_CASES[codec].error(wide(x), s) + 2e-45).all()


any_float = st.one_of(
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4028235e38, -3.39e38, 1e37, 1e-45, -1e-40, 65504.0]),
    st.integers(0, 2**32 - 1).map(lambda bits: struct.unpack("f", struct.pack("I", bits))[0]),
    st.floats(width=32, min_value=-10, max_value=10),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(any_float, min_size=1, max_size=70))
@each_codec
def test_any_values(place, codec, values):
    x = kept(codec, torch.tensor(values, dtype=torch.float32, device=place.device))
    case, block = CODEC_CASES[codec], CODECS[codec].block
    codes, scales = quantize_blockwise(x, codec=codec, backend=place.backend)
    check(codec, x, codes, scales)
    back = wide(dequantize_blockwise(codes, scales, codec=codec, shape=x.shape, backend=place.backend))
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
def test_every_not_finite_pattern_marks_its_block(place, codec):
    block = CODECS[codec].block
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, -8388607, 0x7F800000, -8388608], dtype=torch.int32)
    x = torch.ones(len(patterns) + 1, block)
    x.view(torch.int32)[:-1, 3] = patterns
    x = x.to(place.device)
    codes, scales = quantize_blockwise(x, codec=codec, backend=place.backend)
    back = dequantize_blockwise(codes, scales, codec=codec, shape=x.shape, backend=place.backend)
    assert not back[:-1].isfinite().any()
    torch.testing.assert_close(back[-1].cpu(), torch.ones(block))


@each_codec
def test_bytes_per_value(codec):
    codes, scales = CODECS[codec].encode(torch.randn(1 << 16))
    assert (codes.nbytes + scales.nbytes) / (1 << 16) == CODECS[codec].bytes_per_value
    assert CODECS[codec].bits == CODEC_CASES[codec].BITS
    assert CODECS[codec].bytes_per_value == CODEC_CASES[codec].BYTES_PER_VALUE
    assert CODECS[codec].scale_count(129) == -(-129 // CODECS[codec].block)
    assert CODECS["plain"].bytes_per_value == 4
    assert CODECS["plain"].scale_count(129) == 0


@each_codec
def test_storing_twice_changes_nothing(place, codec):
    """Decoded values are fixed points but for the largest of a block, whose scale is rounded."""
    x = spread(4096, 0, codec).to(place.device)
    codes, scales = quantize_blockwise(x, codec=codec, backend=place.backend)
    back = dequantize_blockwise(codes, scales, codec=codec, shape=x.shape, backend=place.backend)
    again, scales_again = quantize_blockwise(back, codec=codec, backend=place.backend)
    first, second = (CODEC_CASES[codec].unpack(wide(c), 4096) for c in (codes, again))
    assert np.abs(first - second).max() <= 1
    torch.testing.assert_close(scales.float(), scales_again.float(), rtol=0.02, atol=0)


@each_codec
def test_tiny_gradients_survive(place, codec):
    x = (kept(codec, torch.randn(640)) * 1e-12).to(place.device)  # fp16 scales hold nothing below 6e-8
    codes, scales = quantize_blockwise(x, codec=codec, backend=place.backend)
    back = dequantize_blockwise(codes, scales, codec=codec, shape=x.shape, backend=place.backend)
    s = wide(scales).repeat(CODECS[codec].block)
    assert (np.abs(wide(back) - wide(x)) <= CODEC_CASES[codec].error(wide(x), s)).all()
    assert back.abs().max() > 1e-12


@each_codec
def test_strides_offsets_and_guards(place, codec):
    """A transposed tensor and one off the 16-byte boundary are coded as their values, and codes may be strided."""
    base = spread(3000, 0, codec).to(place.device)
    for x in (base[:1200].view(30, 40).t(), base[1:1090], base[::2], base[5], base[3:3]):
        codes, scales = quantize_blockwise(x, codec=codec, backend=place.backend)
        check(codec, x, codes, scales)
        back = dequantize_blockwise(codes, scales, codec=codec, shape=x.shape, backend=place.backend)
        odd = torch.zeros((2, *codes.shape), dtype=codes.dtype, device=codes.device)
        odd[1] = codes
        given = {"codec": codec, "shape": x.shape, "backend": place.backend}
        assert torch.equal(dequantize_blockwise(odd[1], scales, **given), back)
        spaced = torch.stack([scales, scales], 1)[:, 0]
        assert torch.equal(dequantize_blockwise(codes, spaced, **given), back)


@pytest.mark.parametrize("bits", [bits for bits in RULES["lion"].state_bits if bits != 32])
def test_the_update_stores_the_same_codes(place, control_rows, bits):
    """With beta2 = 0 and no clipping the momentum that Lion stores is the code of the gradient itself."""
    (codec,) = RULES["lion"].codecs(bits)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3.39e38, -1.0, math.inf, math.nan])
    ends = torch.tensor([3e38, 1e37, -1e38, 1e35] * 16)
    g = torch.cat([spread(640), spread(640, 1) * 1e-30, special.repeat_interleave(64), ends, special, special[:1]])
    g = g.to(place.device)
    codes, scales = codec.encode(torch.zeros_like(g))
    control = control_rows(device=place.device, BETA2_OUT=0.0, GRAD_FACTOR=1.0)
    lion_update_([torch.zeros_like(g)], [g], [codes], control, exp_avg_scales=[scales], ids=[9], backend=place.backend)
    c = row_values(control, 0)
    random = draws(int(c.seed), int(c.step), 9, g.numel()) if codec.random else None
    check(codec.name, g, codes, scales, random)
    bits32 = None if random is None else torch.from_numpy(random.astype(np.uint32).view(np.int32)).to(place.device)
    wanted, wanted_scales = codec.encode(g, bits32)
    unpack = CODEC_CASES[codec.name].unpack
    apart = np.abs(unpack(wide(codes), g.numel()) - unpack(wide(wanted), g.numel()))
    assert apart.max() <= (0 if place.device == "cpu" else 1)
    assert torch.equal(scales.nan_to_num(7, 8, 9), wanted_scales.nan_to_num(7, 8, 9))


@pytest.mark.parametrize("codec", [name for name, codec in CODECS.items() if codec.random])
def test_random_rounding_is_right_on_average(codec):
    """In value, not in levels: a momentum that moves by less than a code moves all the same."""
    used = CODECS[codec]
    x = torch.linspace(0.0, 1.0, 64).repeat(4096, 1)
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, x.shape, generator=generator, dtype=torch.int64).to(torch.int32)
    back = used.decode(*used.encode(x, random), x.shape)
    deviation = back.std(0) / 64 + 1e-9
    assert ((back.mean(0) - x[0]).abs() < 4.5 * deviation).all()
    torch.testing.assert_close(back[:, [0, -1]], x[:, [0, -1]], rtol=3e-7, atol=0)


def test_four_bits_without_a_shape():
    """Packed codes do not know whether their last half is one: the flat tensor ends with it, as a zero."""
    x = spread(77).view(7, 11)
    codes, scales = quantize_blockwise(x, bits=4)
    flat = dequantize_blockwise(codes, scales, bits=4)
    assert flat.shape == (78,)
    assert torch.equal(flat[:77].view(7, 11), dequantize_blockwise(codes, scales, bits=4, shape=(7, 11)))
    assert flat[77] == 0
    for shape in ((7, 12), (75,), (79,), (7, 11, 2)):
        if math.prod(shape) in (77, 78):
            continue
        with pytest.raises(ValueError, match="codes of 4 bits of a tensor of shape"):
            dequantize_blockwise(codes, scales, bits=4, shape=shape)
    with pytest.raises(TypeError, match="expected uint8, as quantize_blockwise makes them with 4 bits"):
        dequantize_blockwise(*quantize_blockwise(x), bits=4)
    with pytest.raises(ValueError, match="no codec has 3 bits; expected 8 or 4"):
        quantize_blockwise(x, bits=3)
    with pytest.raises(ValueError, match="no codec is called 'plain'"):
        quantize_blockwise(x, codec="plain")
