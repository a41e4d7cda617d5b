"""The telemetry kernel against float64 sums."""

import math
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cruxy_kernels import launch, reference, tables, telemetry

# fp32 sums of n terms in chunks: lanes of up to a few hundred terms, then a tree. Each addition rounds by 6e-8, the
# errors are random, and all terms are positive: 1e-5 leaves a margin of ten for the sizes here.
SUM = 1e-5
# exp2(γ log2 a): log2 of a GPU is good to about 1e-7 absolute, times γ|log2 a| <= 4·128 for the largest exponents.
POWER = 5e-5
SIZES = (0, 1, 127, 128, 129, 2048, 65537)


def expected(grads, gamma, scale=1.0):
    g = torch.cat([g.double().reshape(-1).cpu() for g in grads]) / scale
    a = g[g.isfinite()].abs()
    top = a.max().item() if a.numel() else 0.0
    return [(a**gamma).sum().item(), (a * a).sum().item(), top, (~g.isfinite()).sum().item()]


def check(found, wanted, gamma):
    assert found.dtype == torch.float32
    found = found.tolist()
    assert found[0] == pytest.approx(wanted[0], rel=SUM if gamma == 1.5 else POWER, abs=1e-37)
    assert found[1] == pytest.approx(wanted[1], rel=SUM, abs=1e-37)
    assert found[2] == pytest.approx(wanted[2], rel=2e-7)
    assert found[3] == wanted[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(device, dtype, size):
    torch.manual_seed(size)
    grads = [(torch.randn(size, device=device) * 3).to(dtype)]
    check(telemetry.gradient_telemetry(grads), expected(grads, 1.5), 1.5)


def test_a_million_and_three(device):
    torch.manual_seed(0)
    grads = [torch.randn(1_000_003, device=device)]
    check(telemetry.gradient_telemetry(grads), expected(grads, 1.5), 1.5)


@pytest.mark.parametrize("gamma", [1.0, 1.25, 2.0, 3.0, 4.0])
def test_any_gamma(device, gamma):
    torch.manual_seed(1)
    grads = [torch.randn(3000, device=device) * 0.01, torch.zeros(5, device=device)]
    found = telemetry.gradient_telemetry(grads, gamma=gamma)
    check(found, expected(grads, gamma), gamma)
    if gamma == 2.0:  # the L2 norm
        assert found[0].item() == pytest.approx(found[1].item(), rel=POWER)


def test_gamma_outside_its_range(device):
    for gamma in (0.5, 4.5, math.nan):
        with pytest.raises(ValueError, match="from 1 to 4"):
            telemetry.gradient_telemetry([torch.ones(2, device=device)], gamma=gamma)
    with pytest.raises(ValueError, match="at least one"):
        telemetry.gradient_telemetry([])


def test_many_tensors_mixed_dtypes_and_views(device):
    torch.manual_seed(2)
    base = torch.randn(5000, device=device)
    grads = [
        base[1:1026],  # 4 bytes past a 16-byte boundary
        base[3:3],
        base[7],  # 0-dim
        base[:4096].view(64, 64).t(),  # not contiguous
        base[:2048].half(),
        torch.randn(2050, device=device).half()[1:2049],  # fp16, 2 bytes past a boundary
        base[:100].bfloat16(),
    ]
    check(telemetry.gradient_telemetry(grads), expected(grads, 1.5), 1.5)
    per_tensor = telemetry.gradient_telemetry(grads, per_tensor=True)
    assert per_tensor.shape == (len(grads), 4)
    for row, grad in zip(per_tensor, grads, strict=True):
        check(row, expected([grad], 1.5), 1.5)


def test_grad_scale(device):
    grads = [torch.full((1500,), 3.0, device=device), torch.tensor([math.inf], device=device)]
    scale = torch.tensor(65536.0, device=device)
    found = telemetry.gradient_telemetry(grads, grad_scale=scale)
    check(found, expected(grads, 1.5, 65536.0), 1.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1023, 1024, 2047, 2048])
def test_non_finite_elements_are_counted_and_left_out(device, value, position):
    grads = [torch.ones(2049, device=device)]
    grads[0][position] = value
    check(telemetry.gradient_telemetry(grads), [2048.0, 2048.0, 1.0, 1.0], 1.5)


def test_fp16_is_widened_before_the_power(device):
    grads = [torch.full((64,), 65504.0, dtype=torch.float16, device=device)]
    check(telemetry.gradient_telemetry(grads), expected(grads, 1.5), 1.5)


def test_same_bits_twice_and_whatever_the_address(device):
    torch.manual_seed(3)
    grads = [torch.randn(n, device=device) for n in (5000, 2048, 77)]
    first = telemetry.gradient_telemetry(grads)
    again = telemetry.gradient_telemetry(grads)
    moved = telemetry.gradient_telemetry([g.clone() for g in grads])
    assert torch.equal(first, again)
    assert torch.equal(first, moved)


def test_partial_rows_add_up(device):
    torch.manual_seed(4)
    grads = [torch.randn(5000, device=device), torch.randn(3000, device=device).half()]
    partial = telemetry.gradient_telemetry(grads, partial=True)
    assert partial.dim() == 2
    total = telemetry.gradient_telemetry(grads)
    torch.testing.assert_close(partial[:, :2].sum(0), total[:2], rtol=SUM, atol=0)
    assert partial[:, 2].max() == total[2]


def test_several_chunks_a_program(device, monkeypatch):
    # 65,537 elements are 65 chunks; with 4 programs each adds 17, and the last fewer.
    monkeypatch.setattr(telemetry, "MAX_PARTIALS", 4)
    torch.manual_seed(5)
    grads = [torch.randn(65537, device=device)]
    assert len(telemetry.gradient_telemetry(grads, partial=True)) == 4
    check(telemetry.gradient_telemetry(grads), expected(grads, 1.5), 1.5)


def test_element_offsets_have_64_bits(device):
    """A row that claims to start 2^33 elements before the data, and a block map that asks for the end of it."""
    data = torch.randn(1024, device=device)
    far = 2**33
    rows = torch.zeros((1, tables.COLUMNS.value), dtype=torch.int64)
    rows[0, tables.GRAD.value] = data.data_ptr() - 4 * far
    rows[0, tables.NUMEL.value] = far + 1024
    rows[0, tables.ALIGNED.value] = int(data.data_ptr() % 16 == 0)
    chunk = torch.tensor([far // tables.CHUNK], dtype=torch.int32, device=device)
    partials = torch.zeros((1, 4), device=device)
    launch.launch(
        telemetry.telemetry_kernel, 1, rows.to(device), torch.zeros_like(chunk), chunk, 1, 1, partials, 1.5,
        partials, GRAD_TYPE="fp32", HAS_SCALE=False, GAMMA_IS_1_5=True, ROWS=tables.CHUNK // 8,
    )  # fmt: skip
    check(partials[0], expected([data], 1.5), 1.5)


# Any bit pattern: denormals, both zeros, infinities and NaN as often as other numbers.
any_float = st.one_of(
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, -65504.0, 1e-45, -1e-39, 1e-19, 3e18]),
    st.integers(0, 2**32 - 1).map(lambda bits: struct.unpack("f", struct.pack("I", bits))[0]),
    st.floats(width=32, min_value=-1e4, max_value=1e4),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(any_float, max_size=40), repeats=st.integers(1, 60), offset=st.integers(0, 7))
def test_any_values(device, values, repeats, offset):
    data = torch.tensor([0.0] * offset + values * repeats, dtype=torch.float32, device=device)
    grads = [data[offset:]]
    wanted = expected(grads, 1.5)
    found = telemetry.gradient_telemetry(grads).tolist()
    assert found[3] == wanted[3]
    assert found[2] == pytest.approx(wanted[2], rel=2e-7, abs=1e-44)
    for k in (0, 1):
        if wanted[k] > 3.4e38:  # above fp32: an infinity, which the control kernel takes for a non-finite step
            assert found[k] == math.inf or found[k] == pytest.approx(wanted[k], rel=1e-3)
        else:  # squares below 1e-38 are denormal, 40 x 60 of them may lose 1e-45 each
            assert found[k] == pytest.approx(wanted[k], rel=SUM, abs=1e-35)


def test_twin_agrees(device):
    torch.manual_seed(6)
    grads = [torch.randn(n, device=device) for n in (2048, 129, 1, 0)]
    for per_tensor in (False, True):
        kernel = telemetry.gradient_telemetry(grads, per_tensor=per_tensor)
        twin = reference.gradient_telemetry(grads, per_tensor=per_tensor)
        torch.testing.assert_close(kernel, twin, rtol=SUM, atol=0)
