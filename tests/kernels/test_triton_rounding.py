"""The rounding of the kernels on values and bit patterns; test_rules.py looks at it on parameters."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import draws

from cruxy_kernels.rounding import random_bits_kernel, round_stochastic, round_stochastic_kernel
from cruxy_kernels.storage import load_values, store_nearest

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@triton.jit
def rounding_kernel(bits, out, random_out, seed, step, tensor, start, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    values = tl.load(bits + index).to(tl.float32, bitcast=True)
    number = tl.load(tensor)
    step, seed = tl.load(step).to(tl.int32), tl.load(seed).to(tl.int32)
    random = random_bits_kernel(seed, step, number, start + index.to(tl.int64))
    tl.store(random_out + index, random.to(tl.int32, bitcast=True))
    tl.store(out + index, round_stochastic_kernel(values, random, TYPE))


@triton.jit
def nearest_kernel(bits, out, count, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    values = tl.load(bits + index).to(tl.float32, bitcast=True)
    store_nearest(tl.load(out), 0, index, count, values, TYPE, True)


@triton.jit
def widened_kernel(address, out, count, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    values = load_values(tl.load(address), 0, index, count, TYPE, True)
    tl.store(out + index, values.to(tl.int32, bitcast=True))


def round_by_kernel(device, values, dtype, step, tensor, start=0, seed=11):
    """(rounded values, the random bits they took)."""
    out = torch.empty(len(values), dtype=dtype, device=device)
    random = torch.empty(len(values), dtype=torch.int32, device=device)
    target = out.view(torch.int16) if dtype == torch.bfloat16 else out
    numbers = [torch.tensor([float(n)], device=device) for n in (seed, step)]
    number = torch.tensor([tensor], device=device)
    rounding_kernel[(1,)](
        values.view(torch.int32), target, random, *numbers, number, start, TYPE=DTYPES[dtype], BLOCK=len(values)
    )
    return out, random


def patterns(device):
    """1,024 fp32 bit patterns: every kind of NaN, infinities, the ends of all ranges, and random ones."""
    special = [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001, 0xFF800001, 0x7FFF8000, 0x7F808000, 0x7F800000,
               0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF, 0, 0x80000000, 1, 0x80000001, 0x477FE000, 0x477FEFFF,
               0x477FF000]  # fmt: skip
    numbers = np.random.default_rng(0).integers(0, 1 << 32, 1024, dtype=np.uint32)
    numbers[: len(special)] = special
    return torch.from_numpy(numbers.view(np.int32)).to(device)


@each_dtype
@pytest.mark.parametrize("start", [0, 2**33 + 5])
def test_equals_the_specification(device, dtype, start):
    torch.manual_seed(0)
    values = (torch.randn(1024) * torch.exp(4 * torch.randn(1024))).to(device)
    values[:6] = torch.tensor([0.0, -0.0, math.inf, -math.inf, 65519.0, 3.4e38])
    ours, random = round_by_kernel(device, values, dtype, 17, 3, start)
    np.testing.assert_array_equal(random.cpu().numpy().view(np.uint32), draws(11, 17, 3, 1024, start))
    wanted = round_stochastic(values.cpu(), random.cpu(), dtype)
    assert torch.equal(ours.cpu().view(torch.int16), wanted.view(torch.int16))
    assert ours[2] == math.inf
    assert ours[4:6].isfinite().all()


@each_dtype
def test_any_bit_pattern(device, dtype):
    bits = patterns(device)
    values = bits.view(torch.float32)
    ours, random = round_by_kernel(device, values, dtype, 5, 0)
    assert torch.equal(ours.isnan(), values.isnan())
    assert torch.equal(ours.isinf(), values.isinf())
    assert torch.equal(ours.signbit()[~ours.isnan()], values.signbit()[~ours.isnan()])
    wanted = round_stochastic(values.cpu(), random.cpu(), dtype)
    assert torch.equal(ours.cpu().nan_to_num(7.5), wanted.nan_to_num(7.5))


@each_dtype
def test_right_on_average(device, dtype):
    """0.3 of a gap above 1 (and above a denormal fp16): rounded up in 30 % of 4,096 draws, to 4 sigma."""
    for base in (1.0, 2.0**-20):
        gap = torch.finfo(dtype).eps * base if dtype == torch.bfloat16 or base == 1.0 else 2.0**-24
        values = torch.full((4096,), base + 0.3 * gap, device=device)
        up = (round_by_kernel(device, values, dtype, 5, 0)[0].float() > base).float().mean().item()
        assert up == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 4096))


@each_dtype
def test_representable_values_stay(device, dtype):
    bits = torch.arange(-32768, 32768, 64, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).float()
    values = values[~values.isnan()].contiguous()[: 1 << 9].to(device)
    assert torch.equal(round_by_kernel(device, values, dtype, 9, 1)[0].float(), values)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")]
)
def test_nearest_is_the_processors(device, dtype, name):
    """What a 16-bit state is stored with: ties to even, NaN and infinities included."""
    bits = patterns(device)
    out = torch.zeros(1024, dtype=dtype, device=device)
    nearest_kernel[(1,)](bits, torch.tensor([out.data_ptr()], device=device), 1000, TYPE=name, BLOCK=1024)
    values, out = bits.view(torch.float32).cpu(), out.cpu()
    wanted = values.to(dtype)
    assert torch.equal(out[:1000].isnan(), values[:1000].isnan())
    assert torch.equal(out[:1000].nan_to_num(7, 8, 9), wanted[:1000].nan_to_num(7, 8, 9))
    assert torch.equal(out.isinf()[:1000], wanted.isinf()[:1000])
    assert not out[1000:].any()


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_every_16_bit_value_is_widened(device, dtype, name):
    stored = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    out = torch.empty(1 << 16, dtype=torch.int32, device=device)
    address = torch.tensor([stored.data_ptr()], device=device)
    widened_kernel[(1,)](address, out, 1 << 16, TYPE=name, BLOCK=1 << 16)
    found, wanted = out.view(torch.float32).cpu(), stored.cpu().float()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(7.5, 8.5, 9.5), wanted.nan_to_num(7.5, 8.5, 9.5))
