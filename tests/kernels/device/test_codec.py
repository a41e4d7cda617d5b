"""The codec and the stochastic rounding: kernels against twins, and the twins against what they promise."""

import math
import struct

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cruxy_kernels import codec, codec_reference, rounding_reference
from cruxy_kernels.rounding import random_bits, round_stochastic

SIZES = (0, 1, 63, 64, 65, 127, 128, 129, 2048, 65537)


def same(a, b):
    return torch.equal(a.cpu().nan_to_num(7.5, 8.5, 9.5), b.cpu().nan_to_num(7.5, 8.5, 9.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_kernel_equals_twin(device, size, dtype):
    torch.manual_seed(size)
    x = (torch.randn(size, device=device) * torch.exp(2 * torch.randn(size, device=device))).to(dtype)
    codes, scales = codec.quantize_blockwise(x)
    want_codes, want_scales = codec_reference.quantize_blockwise(x.cpu())
    assert torch.equal(scales.cpu(), want_scales)
    # On a GPU the division is good to 2 ulp: a value on the border between two codes may take the other.
    difference = (codes.cpu().int() - want_codes.int()).abs()
    assert difference.numel() == 0 or difference.max() <= (0 if device == "cpu" else 1)
    back = codec.dequantize_blockwise(codes, scales, dtype)
    assert back.dtype == dtype
    torch.testing.assert_close(
        back.cpu(), codec_reference.dequantize_blockwise(codes.cpu(), scales.cpu(), dtype), rtol=1e-6, atol=1e-9
    )


any_float = st.one_of(
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4028235e38, -3.39e38, 1e-45, -1e-40, 65504.0]),
    st.integers(0, 2**32 - 1).map(lambda bits: struct.unpack("f", struct.pack("I", bits))[0]),
    st.floats(width=32, min_value=-10, max_value=10),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(any_float, min_size=1, max_size=70))
def test_any_values(device, values):
    x = torch.tensor(values, dtype=torch.float32, device=device)
    codes, scales = codec.quantize_blockwise(x)
    want_codes, want_scales = codec_reference.quantize_blockwise(x.cpu())
    assert same(scales.float(), want_scales.float())
    assert (codes.cpu().int() - want_codes.int()).abs().max() <= (0 if device == "cpu" else 1)
    back = codec.dequantize_blockwise(codes, scales).cpu()
    for start in range(0, len(values), 64):
        block, result = x[start : start + 64].cpu().double(), back[start : start + 64].double()
        if not block.isfinite().all():
            assert not result.isfinite().any()
            continue
        top = block.abs().max()
        # Half a step of the code is (1 + k x)^2 / (2 · 127 (1 + k)) of the scale, and bfloat16 scales round by 2^-9.
        fraction = block.abs() / top.clamp(min=1e-300)
        bound = top * ((1 + 5 * fraction) ** 2 / (2 * 127 * 6) * 1.1 + fraction * 2.0**-8) + 1e-39
        assert ((result - block).abs() <= bound).all()
        assert (result * block >= 0).all()


def test_state_is_at_most_1_04_bytes():
    codes, scales = codec_reference.quantize_blockwise(torch.randn(1 << 16))
    assert (codes.nbytes + scales.nbytes) / codes.numel() <= 1.04


def test_storing_twice_changes_nothing(device):
    """Decoded values are fixed points but for the largest of a block, whose scale is rounded."""
    x = torch.randn(4096, device=device)
    codes, scales = codec.quantize_blockwise(x)
    again, scales_again = codec.quantize_blockwise(codec.dequantize_blockwise(codes, scales))
    assert (codes.int() - again.int()).abs().max() <= 1
    torch.testing.assert_close(scales.float(), scales_again.float(), rtol=0.02, atol=0)


def test_tiny_gradients_survive(device):
    x = torch.randn(640, device=device) * 1e-12  # fp16 scales hold nothing below 6e-8
    back = codec.dequantize_blockwise(*codec.quantize_blockwise(x))
    assert (back - x).abs().max() < 0.03 * x.abs().max()


def test_arguments_that_do_not_fit(device):
    with pytest.raises(TypeError, match="floating-point"):
        codec.quantize_blockwise(torch.ones(3, dtype=torch.int32, device=device))
    codes, scales = codec.quantize_blockwise(torch.ones(100, device=device))
    with pytest.raises(ValueError, match="scales of shape"):
        codec.dequantize_blockwise(codes, scales[:1])
    with pytest.raises(TypeError, match="int8 codes"):
        codec.dequantize_blockwise(codes.int(), scales)


@triton.jit
def rounding_kernel(values, out, step, tensor, start, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    random = random_bits(step, tensor, start + index.to(tl.int64))
    rounded = round_stochastic(tl.load(values + index), random, TYPE)
    tl.store(out + index, rounded)


def rounded_by_kernel(device, values, dtype, step, tensor, start=0):
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    out = torch.empty(len(values), dtype=dtype, device=device)
    target = out.view(torch.int16) if dtype == torch.bfloat16 else out
    tensor_number = torch.tensor(tensor)
    rounding_kernel[(1,)](values, target, step, int(tensor_number), start, TYPE=name, BLOCK=len(values))
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", [0, 2**33 + 5])
def test_rounding_equals_twin(device, dtype, start):
    torch.manual_seed(0)
    values = torch.randn(1024, device=device) * torch.exp(4 * torch.randn(1024, device=device))
    values[:6] = torch.tensor([0.0, -0.0, math.inf, -math.inf, 65519.0, 3.4e38])
    ours = rounded_by_kernel(device, values, dtype, 17, 3, start)
    random = rounding_reference.random_bits(torch.tensor(17.0), [3], [1024], start)
    twin = rounding_reference.round_stochastic(values.cpu(), random, dtype)
    assert torch.equal(ours.cpu().view(torch.int16), twin.view(torch.int16))
    assert ours[2] == math.inf
    assert ours[4:6].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_right_on_average(device, dtype):
    """0.3 of a gap above 1 (and above a denormal fp16): rounded up in 30 % of 4,096 draws, to 4 sigma."""
    for base in (1.0, 2.0**-20):
        gap = torch.finfo(dtype).eps * base if dtype == torch.bfloat16 or base == 1.0 else 2.0**-24
        values = torch.full((4096,), base + 0.3 * gap, device=device)
        up = (rounded_by_kernel(device, values, dtype, 5, 0).float() > base).float().mean().item()
        assert up == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 4096))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_representable_values_stay(device, dtype):
    bits = torch.arange(-32768, 32768, 64, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).float()
    values = values[~values.isnan()].contiguous()[: 1 << 9].to(device)
    assert torch.equal(rounded_by_kernel(device, values, dtype, 9, 1).float(), values)


def test_draws_differ_by_step_tensor_and_element():
    a = rounding_reference.random_bits(torch.tensor(1.0), [0, 1], [1000, 1000])
    b = rounding_reference.random_bits(torch.tensor(2.0), [0], [1000])
    assert len(set(a.tolist()) | set(b.tolist())) == 3000
