"""The Lion and AdamW kernels against their formulas in float64."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cruxy_kernels import adamw, lion, reference
from cruxy_kernels import layout as L
from cruxy_kernels.codec_reference import dequantize_blockwise, quantize_blockwise

# A sum takes a few fp32 roundings (6e-8 each) of its terms, so errors are bounded by the terms, not by the sum.
ROUNDINGS = 3e-7
# Lion's sign is undecided where |u| is within a few roundings of its terms: such elements are left out.
UNDECIDED = 1e-6
SIZES = (0, 1, 127, 128, 129, 2048, 65537)


def double(tensors):
    return [t.detach().cpu().double() for t in tensors]


def lion_formula(p, g, m, control, factor=1.0, multiplier=1.0):
    """(parameter, momentum, the u whose sign was taken), float64."""
    c = control.double().cpu()
    g = g * c[L.CLIP_COEF] * factor
    u = c[L.BETA1_OUT] * m + (1 - c[L.BETA1_OUT]) * g
    lr = c[L.LR_OUT]
    p = p * (1 - lr * c[L.WEIGHT_DECAY]) - lr * multiplier * torch.sign(u)
    return p, c[L.BETA2_OUT] * m + (1 - c[L.BETA2_OUT]) * g, u


def assert_near(found, wanted, *terms):
    """|found - wanted| within ROUNDINGS of the sum of the terms' magnitudes; 1e-37 for denormals."""
    bound = ROUNDINGS * sum(torch.as_tensor(term).abs() for term in terms) + 1e-37
    error = (found.detach().cpu().double() - wanted).abs()
    assert (error <= bound).all(), f"{(error / bound).max()} times the bound"


def check_lion(before, after, control, factor=1.0, multiplier=1.0):
    p0, g0, m0 = double(before)
    p1, m1 = double(after)
    p, m, u = lion_formula(p0, g0, m0, control, factor, multiplier)
    decided = u.abs() > UNDECIDED * (m0.abs() + g0.abs()) + 1e-30
    assert decided.float().mean() > 0.99 or p0.numel() < 100
    assert_near(p1[decided], p[decided], p0[decided], control[L.LR_OUT].cpu())
    assert_near(m1, m, m0, g0)


@pytest.mark.parametrize("size", SIZES)
def test_lion_sizes(device, control_rows, size):
    torch.manual_seed(size)
    p, g, m = (torch.randn(size, device=device) for _ in range(3))
    before = [p.clone(), g.clone(), m.clone()]
    control = control_rows()
    lion.lion_update_([p], [g], [m], control)
    check_lion(before, [p, m], control[0])
    assert torch.equal(g, before[1])


@pytest.mark.slow
def test_lion_8bit_a_million_and_three(device, control_rows):
    torch.manual_seed(0)
    check_lion_8bit(device, control_rows, 1_000_003)


def check_lion_8bit(device, control_rows, size):
    p, g = torch.randn(size, device=device), torch.randn(size, device=device) * 1e-3
    codes, scales = quantize_blockwise(torch.randn(size, device=device) * 1e-4)
    m = dequantize_blockwise(codes, scales)
    before = [p.clone(), g.clone(), m]
    control = control_rows()
    lion.lion_update_([p], [g], [codes], control, exp_avg_scales=[scales])
    p64, m64, u = lion_formula(*double(before), control[0])
    decided = u.abs() > UNDECIDED * (before[1].abs() + m.abs()).cpu() + 1e-30
    assert_near(p.cpu()[decided], p64[decided], before[0].cpu()[decided], control[0, L.LR_OUT].cpu())
    # The stored momentum is the code of the exact one: equal but for values on the border between two codes.
    want_codes, want_scales = quantize_blockwise(m64.float())
    assert (scales.cpu() != want_scales).sum() <= 1 + size // 20000
    same_scale = (scales.cpu() == want_scales).repeat_interleave(64)[:size]
    difference = (codes.cpu().int() - want_codes.int()).abs()[same_scale]
    assert difference.numel() == 0 or difference.max() <= 1
    assert (difference > 0).float().sum() <= 1 + size * 1e-4


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1024, 1089])
def test_lion_8bit_sizes(device, control_rows, size):
    torch.manual_seed(size)
    check_lion_8bit(device, control_rows, size)


def test_lion_several_rows_multipliers_scale_and_ascent(device, control_rows):
    torch.manual_seed(1)
    sizes = [2048, 5, 1500]
    p, g, m = ([torch.randn(n, device=device) for n in sizes] for _ in range(3))
    before = [[t.clone() for t in tensors] for tensors in (p, g, m)]
    control = control_rows(2)
    control[1, L.LR_OUT] = 5e-3
    control[1, L.WEIGHT_DECAY] = 0.0
    control[1, L.BETA2_OUT] = 0.5
    multipliers = torch.tensor([0.3, 1.0, 1.7], device=device)
    scale = torch.tensor([8.0], device=device)
    lion.lion_update_(
        p, g, m, control, rows=[0, 1, 1], lr_multipliers=multipliers, grad_scale=scale, maximize=True
    )
    for i, row in enumerate([0, 1, 1]):
        check_lion([b[i] for b in before], [p[i], m[i]], control[row], -1 / 8, multipliers[i].item())


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("size", [0, 1, 129, 2048, 3001])
def test_adamw(device, control_rows, nesterov, decoupled, size):
    torch.manual_seed(size)
    p, g, m = (torch.randn(size, device=device) for _ in range(3))
    v = torch.rand(size, device=device)
    p0, g0, m0, v0 = double([p, g, m, v])
    control = control_rows()
    adamw.adamw_update_([p], [g], [m], [v], control, nesterov=nesterov, decoupled=decoupled)
    c = control[0].double().cpu()
    lr, decay, beta1, beta2 = c[L.LR_OUT], c[L.WEIGHT_DECAY], c[L.BETA1_OUT], c[L.BETA2_OUT]
    g0 = g0 * c[L.CLIP_COEF] + (0 if decoupled else decay * p0)
    m_old, v_old = m0, v0
    m0, v0 = beta1 * m0 + (1 - beta1) * g0, beta2 * v0 + (1 - beta2) * g0**2
    numerator = beta1 * m0 + (1 - beta1) * g0 if nesterov else m0
    step = lr * c[L.BIAS_CORRECTION2_SQRT] / c[L.BIAS_CORRECTION1]
    root = v0.sqrt() + c[L.EPS]
    p_new = p0 * (1 - lr * decay if decoupled else 1) - step * numerator / root
    assert_near(p, p_new, p0, 2 * step * (m_old.abs() + g0.abs()) / root)
    assert_near(m, m0, m_old, g0)
    assert_near(v, v0, v_old, 2 * g0**2 + decay * p0.abs() * g0.abs())


def test_adamw_8bit_momentum(device, control_rows):
    torch.manual_seed(7)
    p, g, v = torch.randn(1500, device=device), torch.randn(1500, device=device), torch.rand(1500, device=device)
    codes, scales = quantize_blockwise(torch.randn(1500, device=device))
    m, exact = dequantize_blockwise(codes, scales), [p.clone(), v.clone()]
    control = control_rows()
    adamw.adamw_update_([p], [g], [codes], [v], control, exp_avg_scales=[scales])
    adamw.adamw_update_([exact[0]], [g], [m], [exact[1]], control)
    assert torch.equal(p, exact[0])
    assert torch.equal(v, exact[1])
    want, _ = quantize_blockwise(m)
    assert (codes.int() - want.int()).abs().max() <= 1


@pytest.mark.parametrize("state", ["fp32", "param", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_parameters_round_as_the_twin_does(device, control_rows, dtype, state):
    torch.manual_seed(2)
    sizes = [3000, 70]
    p, g = ([torch.randn(n, device=device).to(dtype) for n in sizes] for _ in range(2))
    m = [torch.randn(n, device=device) for n in sizes]
    control = control_rows(LR_OUT=1e-4)
    scales = twin_scales = None
    if state == "int8":
        pairs = [quantize_blockwise(t) for t in m]
        m, scales = [c for c, _ in pairs], [s for _, s in pairs]
        twin_scales = [s.clone() for s in scales]
    elif state == "param":
        m = [t.to(dtype) for t in m]
    twin_p, twin_m = [t.clone() for t in p], [t.clone() for t in m]
    before = [t.clone() for t in p]
    lion.lion_update_(p, g, m, control, exp_avg_scales=scales)
    reference.lion_update_(twin_p, g, twin_m, control, exp_avg_scales=twin_scales)
    for ours, twin, old in zip(p, twin_p, before, strict=True):
        # The same random bits; only where a value lies on the border of its bits may they differ.
        assert (ours != twin).float().mean() < 2e-3
        assert (ours != old).any()
        # No element moves by more than the step and one gap of the format.
        gap = torch.finfo(dtype).eps * old.float().abs() + 6e-8
        assert ((ours.float() - old.float()).abs() <= 1e-4 * 1.2 + gap).all()
    # On average the step arrives, though it is below half a gap for most elements.
    moved = torch.cat([a.float() - b.float() for a, b in zip(p, before, strict=True)])
    assert moved.abs().mean().item() == pytest.approx(1e-4, rel=0.2)
    if state == "param":
        for ours, twin in zip(m, twin_m, strict=True):
            torch.testing.assert_close(ours, twin, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_skip_changes_no_bit(device, control_rows):
    torch.manual_seed(3)
    control = control_rows(SKIP=1.0, CLIP_COEF=math.nan)
    for dtype in (torch.float32, torch.float16):
        p, g = torch.randn(1500, device=device).to(dtype), torch.full((1500,), math.nan, device=device).to(dtype)
        codes, scales = quantize_blockwise(torch.randn(1500, device=device))
        m, v = torch.randn(1500, device=device), torch.rand(1500, device=device)
        tensors = [p, codes, scales, m, v]
        before = [t.clone() for t in tensors]
        lion.lion_update_([p], [g], [codes], control, exp_avg_scales=[scales])
        lion.lion_update_([p], [g], [m], control)
        adamw.adamw_update_([p], [g], [m], [v], control)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_views_strides_and_mixed_dtypes(device, control_rows):
    """Odd offsets, a transposed parameter, 0-dim and empty tensors, three dtype pairs in one call."""
    torch.manual_seed(4)

    def tensors():
        base = torch.randn(6000, device=device)
        return [base[1:1030], base[2000:2600].view(20, 30).t(), base[1990], base[5:5], base[3000:5048].half(),
                torch.randn(700, device=device).bfloat16()[3:]]  # fmt: skip

    p = tensors()
    g = [t.clone() for t in tensors()]
    g[0] = g[0].half()
    m = [torch.randn(t.shape, device=device) for t in p]
    m[1] = m[1].t().contiguous().t()
    before = [[t.clone() for t in same] for same in (p, g, m)]
    control = control_rows(LR_OUT=0.01)
    lion.lion_update_(p, g, m, control)
    for i in (0, 1, 2, 3):
        check_lion([b[i] for b in before], [p[i], m[i]], control[0])
    for i in (4, 5):
        assert (p[i].float() - before[0][i].float()).abs().max() < 0.02
        assert not torch.equal(p[i], before[0][i])


def test_neighbours_of_a_view_keep_their_bits(device, control_rows):
    for offset, length in ((0, 100), (1, 1024), (7, 1025), (64, 2047)):
        base = torch.randn(4096, device=device)
        m, g = torch.zeros(length, device=device), torch.ones(length, device=device)
        before = base.clone()
        lion.lion_update_([base[offset : offset + length]], [g], [m], control_rows())
        changed = base != before
        assert changed[offset : offset + length].all()
        assert not changed[:offset].any()
        assert not changed[offset + length :].any()


def test_same_bits_twice(device, control_rows):
    torch.manual_seed(5)
    start = [torch.randn(2500, device=device).half() for _ in range(2)]
    results = []
    for _ in range(2):
        p, g = start[0].clone(), start[1].clone()
        codes, scales = quantize_blockwise(torch.linspace(-1, 1, 2500, device=device))
        lion.lion_update_([p], [g], [codes], control_rows(), exp_avg_scales=[scales])
        results.append((p, codes, scales))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 1300), min_size=1, max_size=5),
    offset=st.integers(0, 5),
    special=st.sampled_from([0.0, -0.0, 1e-45, -1e-39, 65504.0, 1e30, -1e30]),
    rate=st.sampled_from([0.0, 1e-7, 1e-3, 1.0]),
)
def test_lion_any_shapes_and_values(device, control_rows, sizes, offset, special, rate):
    torch.manual_seed(sum(sizes))
    p, g, m = ([torch.randn(n + offset, device=device)[offset:] for n in sizes] for _ in range(3))
    for tensors in (p, g, m):
        for t in tensors:
            t[::3] = special
    before = [[t.clone() for t in tensors] for tensors in (p, g, m)]
    control = control_rows(LR_OUT=rate)
    lion.lion_update_(p, g, m, control)
    for i in range(len(sizes)):
        p64, m64, u = lion_formula(*double([b[i] for b in before]), control[0])
        decided = (u.abs() > UNDECIDED * (before[1][i].abs() + before[2][i].abs()).cpu() + 1e-30) | (u == 0)
        p0, g0, m0 = double([b[i] for b in before])
        assert_near(p[i].cpu()[decided], p64[decided], p0[decided], rate)
        assert_near(m[i], m64, m0, g0)


def test_lists_that_do_not_fit(device, control_rows):
    p = torch.ones(4, device=device)
    with pytest.raises(ValueError, match="one length"):
        lion.lion_update_([p], [p.clone(), p.clone()], [p.clone()], control_rows())
    with pytest.raises(TypeError, match="float32, float16 or bfloat16"):
        lion.lion_update_([p.double()], [p], [p.clone()], control_rows())
    with pytest.raises(TypeError, match="expected float32"):
        adamw.adamw_update_([p], [p.clone()], [p.clone()], [p.half()], control_rows())
