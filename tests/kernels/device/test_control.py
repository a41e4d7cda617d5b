"""The control kernel against its twin in float64, over whole runs of steps."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cruxy_kernels import control as kernel
from cruxy_kernels import layout as L
from cruxy_kernels import reference

# fp32 against float64: a step makes some twenty roundings, and the EMAs forget old errors at 1 - alpha a step. The
# worst slot is the PD error v_fast - v_slow, a difference of nearly equal numbers: bounded by the terms.
TOLERANCE = 2e-5
UNSTARTED = {"STEP": 0.0, "LR_OUT": 0.0, "BETA1_OUT": 0.0, "BETA2_OUT": 0.0, "CLIP_COEF": 0.0,
             "BIAS_CORRECTION1": 0.0, "BIAS_CORRECTION2_SQRT": 0.0}  # fmt: skip


def assert_close(found, wanted):
    """Every slot; those that are differences are compared on the scale of v_fast."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    scale = torch.ones_like(wanted)
    scale[:, L.ERROR] = wanted[:, L.V_FAST].clamp(min=1e-6)
    scale = torch.maximum(scale.where(scale != 1, wanted.abs()), torch.full_like(scale, 1e-9))
    error = (found - wanted).abs() / scale
    # A beta rounded to fp32 moves 1 - beta^t by up to 6e-8 / (1 - beta): test_bias_corrections looks at these.
    error[:, L.BIAS_CORRECTION1], error[:, L.BIAS_CORRECTION2_SQRT] = 0, 0
    error = torch.where((found == wanted) | (found.isnan() & wanted.isnan()), 0.0, error)
    worst = error.max(dim=1)
    assert (error <= TOLERANCE).all(), f"slot {worst.indices.tolist()}: relative error {worst.values.tolist()}"


def run(device, start, law, telemetries, losses, found_inf=None):
    ours, twin = start.clone(), start.double().cpu()
    for i, telemetry in enumerate(telemetries):
        telemetry = torch.tensor(telemetry, dtype=torch.float32, device=device)
        loss = None if losses is None else torch.tensor(losses[i], dtype=torch.float32, device=device)
        inf = None if found_inf is None else torch.tensor(found_inf[i], device=device)
        kernel.control_step(ours, telemetry, loss, law=law, found_inf=inf)
        reference.control_step(
            twin, telemetry.double().cpu(), None if loss is None else loss.double().cpu(), law=law,
            found_inf=None if inf is None else inf.cpu(),
        )  # fmt: skip
    return ours, twin


def noisy(steps, seed, level=3.0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(steps, 4, generator=generator)
    return [[level * (0.5 + a), 0.3 * (0.5 + b), 0.1 + c, 0.0] for a, b, c, _ in noise.tolist()]


@pytest.mark.parametrize("law", L.LAWS)
@pytest.mark.parametrize("loss", [True, False])
def test_sixty_steps(device, control_rows, law, loss):
    start = control_rows(2, **UNSTARTED)
    start[1, L.LR], start[1, L.BETA1], start[1, L.BETA2] = 3e-4, 0.85, 0.999
    telemetries = noisy(60, 1)
    telemetries[30] = [400.0, 300.0, 9.0, 0.0]  # an outlier
    losses = [3 - 0.02 * i + (0.5 if i == 31 else 0) for i in range(60)] if loss else None
    assert_close(*run(device, start, law, telemetries, losses))


@pytest.mark.parametrize("law", L.LAWS)
def test_emergency_bounds_and_guard(device, control_rows, law):
    """A jump that lasts: outliers, then the new level; the early warning; clamps at SCALE_MIN."""
    start = control_rows(1, **UNSTARTED, SCALE_MIN=0.9)
    telemetries = [*noisy(20, 2), *noisy(20, 3, level=4000.0)]
    losses = [3.0] * 20 + [3.0 + 40 * (i % 2) for i in range(20)]
    ours, twin = run(device, start, law, telemetries, losses)
    assert_close(ours, twin)
    for guard, high in ((0.0, 4.0), (1.0, math.inf)):
        start = control_rows(1, **UNSTARTED, GUARD=guard, SCALE_MAX=high)
        assert_close(*run(device, start, law, telemetries, losses))


@pytest.mark.parametrize("law", L.LAWS)
@pytest.mark.parametrize(
    ("telemetry", "loss", "found_inf"),
    [
        ([1.0, 1.0, 1.0, 1.0], 1.0, 0.0),
        ([1.0, math.inf, 1.0, 0.0], 1.0, 0.0),
        ([math.nan, 1.0, 1.0, 0.0], 1.0, 0.0),
        ([1.0, 1.0, 1.0, 0.0], math.nan, 0.0),
        ([1.0, 1.0, 1.0, 0.0], -math.inf, 0.0),
        ([1.0, 1.0, 1.0, 0.0], 1.0, 1.0),
    ],
)
def test_a_bad_step_is_skipped(device, control_rows, law, telemetry, loss, found_inf):
    start = control_rows(1, **UNSTARTED)
    good, _ = run(device, start, law, noisy(5, 4), [1.0] * 5)
    ours, twin = run(device, good, law, [telemetry], [loss], [found_inf])
    changed = [i for i in range(L.NUM_SLOTS) if ours[0, i] != good[0, i] and not ours[0, i].isnan()]
    assert set(changed) <= {L.SKIPPED, L.SKIP, L.GRAD_NORM, L.NONFINITE}
    assert ours[0, L.SKIP] == 1
    assert ours[0, L.SKIPPED] == 1
    assert_close(ours, twin)
    resumed, twin = run(device, ours, law, noisy(3, 5), [1.0] * 3, [0.0] * 3)
    assert resumed[0, L.SKIP] == 0
    assert_close(resumed, twin)


def test_partial_sums(device, control_rows):
    rows = torch.rand(3000, 4, device=device) * 1e-3
    rows[:, 3] = 0
    total = torch.stack([rows[:, 0].sum(), rows[:, 1].sum(), rows[:, 2].amax(), rows[:, 3].sum()])
    one, other = control_rows(1, **UNSTARTED), control_rows(1, **UNSTARTED)
    kernel.control_step(one, rows)
    kernel.control_step(other, total)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, equal_nan=True)
    rows[2999, 3] = 1
    kernel.control_step(one, rows)
    assert one[0, L.SKIP] == 1


def test_same_bits_twice(device, control_rows):
    a, _ = run(device, control_rows(1, **UNSTARTED), "meta3", noisy(10, 6), [1.0] * 10)
    b, _ = run(device, control_rows(1, **UNSTARTED), "meta3", noisy(10, 6), [1.0] * 10)
    assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    law=st.sampled_from(list(L.LAWS)),
    scale=st.sampled_from([1e-12, 1e-6, 1.0, 1e6, 1e12]),
    seed=st.integers(0, 1000),
    beta2=st.sampled_from([0.9, 0.95, 0.99, 0.999, 0.9999]),
)
def test_gradients_of_any_scale(device, control_rows, law, scale, seed, beta2):
    start = control_rows(1, **UNSTARTED, BETA2=beta2)
    telemetries = [[a * scale**1.5, b * scale**2, c * scale, 0.0] for a, b, c, _ in noisy(15, seed)]
    assert_close(*run(device, start, law, telemetries, [2.0 + 0.01 * (i % 3) for i in range(15)]))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 0.85, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("t", [1.0, 2.0, 100.0, 1e5])
def test_bias_corrections(device, control_rows, beta, t):
    """1 - beta^t, relative error below 3e-6 where fp32's own log and pow lose everything."""
    start = control_rows(1, **{**UNSTARTED, "AGE": t - 1, "META_BETA2": beta, "STEP": t - 1})
    kernel.control_step(start, torch.tensor([1.0, 1.0, 1.0, 0.0], device=device), law="meta3")
    row = start[0].double().cpu()
    for slot, power in ((L.BIAS_CORRECTION1, 1), (L.BIAS_CORRECTION2_SQRT, 2)):
        used = row[L.BETA1_OUT if power == 1 else L.BETA2_OUT].item()
        assert row[slot].item() ** power == pytest.approx(1 - used**t, rel=3e-6)


def test_wrong_arguments(device, control_rows):
    good = torch.zeros(4, device=device)
    with pytest.raises(ValueError, match="unknown law"):
        kernel.control_step(control_rows(), good, law="meta4")
    with pytest.raises(ValueError, match="expected"):
        kernel.control_step(control_rows()[0], good)
    with pytest.raises(ValueError, match="expected"):
        kernel.control_step(control_rows(), torch.zeros(5, device=device))
    with pytest.raises(ValueError, match="contiguous"):
        kernel.control_step(control_rows(2).t().contiguous().t(), good)
