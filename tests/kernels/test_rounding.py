"""Stochastic rounding: the specification against whole-number arithmetic, and what it promises."""

import math

import numpy as np
import pytest
import torch
from cases import draws, rounded, wide

from cruxy_kernels.rounding import random_bits, round_stochastic

DTYPES = [torch.float16, torch.bfloat16]
SEED, STEP = torch.tensor(11.0), torch.tensor(3.0)


def unsigned(bits):
    return bits.numpy().astype(np.int64) & 0xFFFFFFFF


@pytest.mark.parametrize("start", [0, 5, 2**33 + 5])
def test_bits_are_the_hash(start):
    for seed, step, tensor in ((0, 1, 0), (11, 3, 7), ((1 << 24) - 1, 1 << 20, (1 << 31) - 1)):
        found = random_bits(torch.tensor(float(seed)), torch.tensor(float(step)), [tensor], [1000], start)
        np.testing.assert_array_equal(unsigned(found), draws(seed, step, tensor, 1000, start).astype(np.int64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_the_arithmetic(dtype):
    values = torch.randn(20_000) * torch.exp(4 * torch.randn(20_000))
    values = values[(values.abs() > 2.0**-14) & (values.abs() < 65504)].contiguous()
    random = random_bits(SEED, STEP, [0], [len(values)])
    found = round_stochastic(values, random, dtype)
    np.testing.assert_array_equal(wide(found), rounded(wide(values), unsigned(random), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_on_average_and_never_further_than_a_neighbour(dtype):
    values = torch.cat([torch.linspace(-2, 2, 41), torch.tensor([1e-6, 3.3e-5, -5e-8, 1000.3])])
    random = torch.stack([random_bits(SEED, torch.tensor(t), [0], [len(values)]) for t in range(4000)])
    result = round_stochastic(values.expand(4000, -1).contiguous(), random, dtype)
    assert result.dtype == dtype
    gap = (torch.finfo(dtype).eps * values.abs()).clamp(min=2.0**-24 if dtype == torch.float16 else 0)
    error = result.double().mean(0) - values.double()
    assert (error.abs() <= 0.05 * gap + 1e-12).all()  # 4,000 draws: standard error 0.008 of a gap
    assert ((result.float() - values).abs() <= gap).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_representable_values_survive_and_large_ones_saturate(dtype):
    top = torch.finfo(dtype).max
    values = torch.tensor([0.0, -0.0, 1.0, -0.5, top, torch.finfo(dtype).tiny, math.inf])
    random = torch.full((len(values),), -1, dtype=torch.int32)
    kept = round_stochastic(values, random, dtype).float()
    assert torch.equal(kept, values)
    assert torch.equal(kept.signbit(), values.signbit())
    beyond = torch.tensor([1e6, -1e6] if dtype == torch.float16 else [3.4e38, -3.4e38])
    assert round_stochastic(beyond, random[:2], dtype).tolist() == [top, -top]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan(dtype):
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, -8388607, 0x7F808000], dtype=torch.int32)
    for random in (0, -1):
        found = round_stochastic(patterns.view(torch.float32), torch.full((6,), random, dtype=torch.int32), dtype)
        assert found.isnan().all()


def test_bits_differ_by_seed_step_tensor_and_element():
    both = random_bits(SEED, STEP, [0, 7], [5, 6])
    assert torch.equal(both[:5], random_bits(SEED, STEP, [0], [5]))
    assert torch.equal(both[5:], random_bits(SEED, STEP, [7], [6]))
    assert torch.equal(random_bits(SEED, STEP, [7], [3], start=3), both[8:])
    runs = [random_bits(SEED, STEP, [0], [1000]), random_bits(SEED, STEP, [1], [1000]),
            random_bits(SEED, STEP + 1, [0], [1000]), random_bits(SEED + 1, STEP, [0], [1000])]  # fmt: skip
    assert len(set(torch.cat(runs).tolist())) == 4000


def test_every_bit_is_even():
    bits = random_bits(SEED, STEP, [0], [100_000])
    shares = [((bits >> k) & 1).float().mean().item() for k in range(32)]
    assert max(abs(share - 0.5) for share in shares) < 0.01
