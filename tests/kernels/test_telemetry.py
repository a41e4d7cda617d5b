"""Gradient statistics on every backend against sums in float64."""

import math
import struct
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cruxy_kernels import gradient_telemetry
from cruxy_kernels import layout as L

# fp32 sums of n terms in chunks: lanes of up to a few hundred terms, then a tree. Each addition rounds by 6e-8, the
# errors are random, and all terms are positive: 1e-6 is 16 roundings.
SUM = 1e-6
# exp2(γ log2 a): log2 of a GPU is good to about 1e-7 absolute, times γ|log2 a| <= 4·128 for the largest exponents.
POWER = 5e-5
SIZES = (0, 1, 127, 128, 129, 2048, 65537)
SHAPES = [(), (1,), (127,), (128,), (3, 43), (0,), (5, 0), (2048,), (65_537,), (2, 3, 5, 7)]


def tensors(place, shapes=SHAPES, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(place.device, dtype) for shape in shapes]


def expected(grads, gamma=1.5):
    g = torch.cat([g.double().reshape(-1).cpu() for g in grads])
    a = g[g.isfinite()].abs()
    top = a.max().item() if a.numel() else 0.0
    return [(a**gamma).sum().item(), (a * a).sum().item(), top, (~g.isfinite()).sum().item()]


def check(place, found, wanted, gamma=1.5):
    assert found.dtype == torch.float32
    assert found.device.type == place.device
    found = found.tolist()
    exact = gamma == 1.5 or place.backend != "triton"
    assert found[0] == pytest.approx(wanted[0], rel=SUM if exact else POWER, abs=1e-37)
    assert found[1] == pytest.approx(wanted[1], rel=SUM, abs=1e-37)
    assert found[2] == pytest.approx(wanted[2], rel=2e-7)
    assert found[3] == wanted[3]


@pytest.fixture
def telemetry(place):
    return partial(gradient_telemetry, backend=place.backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(place, telemetry, dtype, size):
    grads = tensors(place, [size], size, dtype, 3.0)
    if place.backend != "torch" and dtype == torch.float64:
        with pytest.raises(TypeError, match="float64"):
            telemetry(grads)
        return
    check(place, telemetry(grads), expected(grads))


def test_a_million_and_three(place, telemetry):
    grads = tensors(place, [1_000_003])
    check(place, telemetry(grads), expected(grads))


@pytest.mark.parametrize("gamma", [1.0, 1.25, 1.5, 2.0, 2.7, 4.0])
def test_any_gamma(place, telemetry, gamma):
    grads = [*tensors(place, [3000], scale=0.01), torch.zeros(5, device=place.device), *tensors(place)[:5]]
    found = telemetry(grads, gamma=gamma)
    check(place, found, expected(grads, gamma), gamma)
    if gamma == 2.0:  # the L2 norm
        assert found[0].item() == pytest.approx(found[1].item(), rel=POWER if place.backend == "triton" else 0)


def test_many_tensors_mixed_dtypes_and_views(place, telemetry):
    base = torch.randn(5000, device=place.device)
    grads = [
        base[1:1026],  # 4 bytes past a 16-byte boundary
        base[3:3],
        base[7],  # 0-dim
        base[:4096].view(64, 64).t(),  # not contiguous
        base[:2048].half(),
        torch.randn(2050, device=place.device).half()[1:2049],  # fp16, 2 bytes past a boundary
        base[:100].bfloat16(),
    ]
    check(place, telemetry(grads), expected(grads))
    rows = telemetry(grads, per_tensor=True)
    assert rows.shape == (len(grads), L.NUM_TELEMETRY)
    for row, grad in zip(rows, grads, strict=True):
        check(place, row, expected([grad]))


def test_per_tensor_adds_up_to_the_total(place, telemetry):
    grads = tensors(place, SHAPES if place.backend != "triton" else SHAPES[:8])
    rows, total = telemetry(grads, per_tensor=True), telemetry(grads)
    assert rows.shape == (len(grads), L.NUM_TELEMETRY)
    torch.testing.assert_close(rows[:, : L.MAX_ABS].sum(0), total[: L.MAX_ABS], rtol=SUM, atol=0)
    assert rows[:, L.MAX_ABS].max() == total[L.MAX_ABS]
    assert telemetry([], per_tensor=True).shape == (0, L.NUM_TELEMETRY)


def test_partial_rows_add_up(place, telemetry):
    grads = tensors(place, [5000, 3000])
    grads[1] = grads[1].half()
    rows, total = telemetry(grads, partial=True), telemetry(grads)
    assert rows.dim() == 2
    torch.testing.assert_close(rows[:, :2].sum(0), total[:2], rtol=SUM, atol=0)
    assert rows[:, 2].max() == total[2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 63, 1023, 1024, 2047, 2048])
def test_non_finite_elements_are_counted_and_left_out(place, telemetry, value, position):
    grads = [torch.ones(2049, device=place.device)]
    grads[0][position] = value
    check(place, telemetry(grads), [2048.0, 2048.0, 1.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_widened_before_the_power(place, telemetry, dtype):
    """65504 squared is beyond fp16, the square of its smallest subnormal below."""
    for value in (65504.0, 2.0**-24):
        grads = [torch.full((1000,), value, dtype=dtype, device=place.device)]
        found = telemetry(grads)
        assert found[L.SUM_SQ].item() == pytest.approx(1000 * value**2, rel=SUM)
        check(place, found, expected(grads))


def test_same_bits_twice_and_whatever_the_address(place, telemetry):
    grads = tensors(place, [5000, 2048, 77], 3)
    first, again = telemetry(grads), telemetry(grads)
    moved = telemetry([g.clone() for g in grads])
    assert torch.equal(first, again)
    assert torch.equal(first, moved)


def test_gradients_are_not_written(place, telemetry):
    buffer = torch.randn(4000, device=place.device)
    before = buffer.clone()
    telemetry([buffer[5:1500], buffer[1600:3000]], per_tensor=True)
    assert torch.equal(buffer, before)


# Any bit pattern: denormals, both zeros, infinities and NaN as often as other numbers.
any_float = st.one_of(
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, -65504.0, 1e-45, -1e-39, 1e-19, 3e18]),
    st.integers(0, 2**32 - 1).map(lambda bits: struct.unpack("f", struct.pack("I", bits))[0]),
    st.floats(width=32, min_value=-1e4, max_value=1e4),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(any_float, max_size=40), repeats=st.integers(1, 60), offset=st.integers(0, 7))
def test_any_values(place, telemetry, values, repeats, offset):
    data = torch.tensor([0.0] * offset + values * repeats, dtype=torch.float32, device=place.device)
    grads = [data[offset:]]
    wanted = expected(grads)
    found = telemetry(grads).tolist()
    assert found[3] == wanted[3]
    assert found[2] == pytest.approx(wanted[2], rel=2e-7, abs=1e-44)
    for k in (0, 1):
        if wanted[k] > 3.4e38:  # above fp32: an infinity, which the control step takes for a non-finite step
            assert found[k] == math.inf or found[k] == pytest.approx(wanted[k], rel=1e-3)
        else:  # squares below 1e-38 are denormal, 40 x 60 of them may lose 1e-45 each
            assert found[k] == pytest.approx(wanted[k], rel=1e-5, abs=1e-35)
