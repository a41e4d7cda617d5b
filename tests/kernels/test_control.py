"""The per-step law on every backend: against equations in Python floats, and its specification in float64."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cruxy_kernels import control_inputs, control_step, gradient_telemetry, new_control
from cruxy_kernels import layout as L
from cruxy_kernels.laws.control import step_law
from cruxy_kernels.laws.telemetry import combine

GOOD = [1.0, 1.0, 1.0, 0.0]
each_law = pytest.mark.parametrize("law", L.LAWS)


# -- the law, written from the text --------------------------------------------------------------------------


class Law:
    """The published laws in Python floats, written from the text: the oracle of control_step."""

    def __init__(self, law: str, lr: float, beta1: float, beta2: float, scale_bounds: tuple[float, float]):
        self.law, self.lr, self.beta1, self.beta2, self.bounds = law, lr, beta1, beta2, scale_bounds
        self.vf = self.vs = self.c = self.e = 0.0
        self.s, self.history, self.previous, self.t = 1.0, [], None, 0

    def step(self, sum_pow: float, sum_sq: float, loss: float | None) -> dict[str, float]:
        self.t += 1
        norm = math.sqrt(sum_sq)
        sigma = sum_sq if self.law == "stability_v1" else sum_pow ** (1 / 1.5)
        self.vf, self.vs = 0.9 * self.vf + 0.1 * sigma, 0.999 * self.vs + 0.001 * sigma
        if self.law != "stability_v1":
            self.history = [self.vf, *self.history][:14]
            weights = [math.exp(-k / 5) for k in range(len(self.history))]
            h = sum(w * v for w, v in zip(weights, self.history, strict=True)) / sum(weights)
            self.vf += 0.2 * (h - self.vf)
        if loss is not None:
            if self.previous is not None:
                c = (loss - self.previous[0]) / (self.previous[1] + 1e-8)
                self.c = 0.95 * self.c + 0.05 * c
            self.previous = (loss, norm)
        phi = self.vf / (self.vf + self.vs + 1e-8)
        e = self.vf - self.vs
        pd, self.e = 0.05 * e + 0.02 * (e - self.e), e
        if self.law == "stability_v1":
            factor = 1 - 0.3 * phi if phi > 0.55 else 1 + 0.2 * (1 - phi) if phi < 0.45 else 1.0
            beta2 = min(max(self.beta2 * (1 + 0.15 * math.tanh(pd / 0.1)), 0.9), 0.9999)
            return {"LR_OUT": self.lr * factor, "BETA1_OUT": 0.9, "BETA2_OUT": beta2, "PHASE": phi, "CLIP_COEF": 1.0}
        beta1 = min(max(self.beta1 * (1 + 0.15 * math.tanh((self.c - 0.01) / 0.05)), 0.85), 0.95)
        threshold = 1 + 0.5 * math.sqrt(self.vf / (self.vs + 1e-8))
        out = {"BETA1_OUT": beta1, "CLIP_THRESHOLD": threshold, "CLIP_COEF": min(1, threshold / (norm + 1e-6))}
        if self.law == "meta3":
            beta2 = min(max(self.beta2 * (1 - 0.3 * phi), 0.9), 0.99999)
            return out | {"LR_OUT": self.lr * self.s * (1 - 0.5 * phi), "BETA2_OUT": beta2, "PHASE": phi}
        phi *= 1 + 0.1 * math.tanh(self.c)
        a = 0.15 if e > 0 else 0.08 if e < 0 else 0.1
        beta2 = min(max(self.beta2 * (1 + 0.15 * math.tanh(pd / a)), 0.9), 0.9999)
        if phi > 0.55:
            self.s *= math.exp(-0.15 * (phi - 0.55))
        elif phi < 0.5:
            self.s *= 1 + 0.08 * (0.55 - phi)
        self.s = min(max(self.s, self.bounds[0]), self.bounds[1])
        return out | {"LR_OUT": self.lr * self.s, "BETA2_OUT": beta2, "PHASE": phi}


@pytest.mark.parametrize(("with_loss", "scale"), [(True, None), (False, None), (True, 1024.0)])
@each_law
def test_it_is_the_law(place, law, with_loss, scale):
    """Signals that rise, fall and jump, with two rows of different settings; the gradients scaled or not."""
    control = new_control(2, device=place.device, guard=False)
    control[1, L.LR], control[1, L.BETA1], control[1, L.BETA2], control[1, L.META_BETA2] = 3e-4, 0.92, 0.95, 0.95
    oracles = [Law(law, 1e-3, 0.9, 0.999, (0.1, 4.0)), Law(law, 3e-4, 0.92, 0.95, (0.1, 4.0))]
    generator = torch.Generator().manual_seed(0)
    steps = 200 if place.backend != "triton" else 76 if scale is None else 10  # the interpreter is slow
    grad_scale = None if scale is None else torch.tensor([scale], device=place.device)
    for step in range(steps):
        level = math.exp(math.sin(step / 20)) * (5 if step in (70, 71) else 1)
        g = level * torch.rand(50, generator=generator).double() * 0.3
        sums = (g.pow(1.5).sum().item(), g.square().sum().item())
        loss = 2 + math.cos(step / 7) + 0.1 * level if with_loss else None
        s = scale or 1.0
        telemetry = torch.tensor([sums[0] * s**1.5, sums[1] * s**2, g.max().item() * s, 0.0], device=place.device)
        given = None if loss is None else torch.tensor(loss, device=place.device)
        control_step(control, telemetry, given, law=law, grad_scale=grad_scale, backend=place.backend)
        found = control.double().cpu()
        for row, oracle in enumerate(oracles):
            wanted = oracle.step(*sums, loss)
            wanted["GRAD_FACTOR"], wanted["GRAD_NORM"] = wanted["CLIP_COEF"] / s, math.sqrt(sums[1])
            wanted["MAX_GRAD"], wanted["GAMMA_NORM"] = g.max().item(), sums[0] ** (1 / 1.5)
            for name, value in wanted.items():
                # fp32 state over 200 steps of EMAs; the tanh of beta1 has slope 20 in the curvature
                got = found[row, getattr(L, name)].item()
                assert got == pytest.approx(value, rel=5e-5), f"{name} of row {row} in step {step}"
            t = step + 1
            corrections = 1 - found[row, L.BETA1_OUT] ** t, (1 - found[row, L.BETA2_OUT] ** t).sqrt()
            assert found[row, L.BIAS_CORRECTION1].item() == pytest.approx(corrections[0].item(), rel=1e-5)
            assert found[row, L.BIAS_CORRECTION2_SQRT].item() == pytest.approx(corrections[1].item(), rel=1e-5)
    assert control[0, L.STEP] == steps


# -- every slot, against the specification in float64 --------------------------------------------------------

# fp32 against float64: a step makes some twenty roundings, and the EMAs forget old errors at 1 - alpha a step. The
# worst slot is the PD error v_fast - v_slow, a difference of nearly equal numbers: bounded by the terms.
TOLERANCE = 2e-5
UNSTARTED = {"STEP": 0.0, "LR_OUT": 0.0, "BETA1_OUT": 0.0, "BETA2_OUT": 0.0, "CLIP_COEF": 0.0, "GRAD_FACTOR": 0.0,
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


def run(place, start, law, telemetries, losses, found_inf=None, grad_scale=None):
    """(control after the steps on the backend, the same by the specification in float64)."""
    ours, reference = start.to(place.device, copy=True), start.double().cpu()
    for i, values in enumerate(telemetries):
        telemetry = torch.tensor(values)
        loss = None if losses is None else torch.tensor(losses[i])
        inf = None if found_inf is None else torch.tensor(found_inf[i])
        scale = None if grad_scale is None else torch.tensor(grad_scale)
        moved = [None if t is None else t.to(place.device) for t in (loss, inf, scale)]
        control_step(ours, telemetry.to(place.device), moved[0], law=law, found_inf=moved[1], grad_scale=moved[2],
                     backend=place.backend)  # fmt: skip
        double = [None if t is None else t.double() for t in (loss, inf, scale)]
        step_law(reference, telemetry.double(), double[0], law, double[1], double[2])
    return ours, reference


def noisy(steps, seed, level=3.0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(steps, 4, generator=generator)
    return [[level * (0.5 + a), 0.3 * (0.5 + b), 0.1 + c, 0.0] for a, b, c, _ in noise.tolist()]


@each_law
@pytest.mark.parametrize("loss", [True, False])
def test_sixty_steps(place, control_rows, law, loss):
    start = control_rows(2, **UNSTARTED)
    start[1, L.LR], start[1, L.BETA1], start[1, L.BETA2], start[1, L.MAXIMIZE] = 3e-4, 0.85, 0.999, 1.0
    telemetries = noisy(60, 1)
    telemetries[30] = [400.0, 300.0, 9.0, 0.0]  # an outlier
    losses = [3 - 0.02 * i + (0.5 if i == 31 else 0) for i in range(60)] if loss else None
    ours, reference = run(place, start, law, telemetries, losses, grad_scale=4.0 if loss else None)
    assert_close(ours, reference)
    assert ours[0, L.GRAD_FACTOR] > 0 > ours[1, L.GRAD_FACTOR]


@each_law
def test_emergency_bounds_and_guard(place, control_rows, law):
    """A jump that lasts: outliers, then the new level; the early warning; clamps at SCALE_MIN."""
    telemetries = [*noisy(20, 2), *noisy(20, 3, level=4000.0)]
    losses = [3.0] * 20 + [3.0 + 40 * (i % 2) for i in range(20)]
    for slots in ({"SCALE_MIN": 0.9}, {"GUARD": 0.0, "SCALE_MAX": 4.0}, {"GUARD": 1.0, "SCALE_MAX": math.inf}):
        assert_close(*run(place, control_rows(1, **UNSTARTED, **slots), law, telemetries, losses))


def test_the_early_warning_halves_the_rate_once_an_interval(place):
    """W = .5 [surge] + .2 [curvature] reaches .7 when the level triples while the loss climbs steeply."""
    control = new_control(device=place.device, bounds=(1e-12, 4.0))
    halvings, scale = 0, 1.0
    for step in range(330):
        if place.backend == "triton" and step < 270:
            # The interpreter is slow: the first steps by the specification.
            step_law(control, torch.tensor(GOOD), torch.tensor(float(step * 20)), "stability_v2", None, None)
            scale = control[0, L.LR_SCALE].item()
            continue
        level = 1.0 if step < 300 else 3.9
        telemetry = torch.tensor([level**1.5, level**2, level, 0.0], device=place.device)
        loss = torch.tensor(float(step * 20), device=place.device)
        control_step(control, telemetry, loss, law="stability_v2", backend=place.backend)
        new = control[0, L.LR_SCALE].item()
        halvings += new < 0.6 * scale
        scale = new
    assert control[0, L.WARNINGS] > 5
    assert 1 <= halvings <= 2


@each_law
@pytest.mark.parametrize("telemetry", [GOOD, [math.nan, 1.0, 1.0, 0.0]])
def test_cooldown_and_trend(place, control_rows, law, telemetry):
    """The first counts down in steps that are taken; the second is of one step, taken or not."""
    ours, reference = run(place, control_rows(1, **UNSTARTED, COOLDOWN=3.0, TREND=0.5), law, [telemetry] * 2, [1.0] * 2)
    assert_close(ours, reference)
    assert ours[0, L.COOLDOWN] == (1 if law == "stability_v2" and telemetry == GOOD else 3)
    assert ours[0, L.TREND] == 0


@each_law
@pytest.mark.parametrize(
    ("telemetry", "loss", "found_inf"),
    [
        ([1.0, 1.0, 1.0, 1.0], 1.0, 0.0),
        ([1.0, math.inf, 1.0, 0.0], 1.0, 0.0),
        ([math.nan, 1.0, 1.0, 0.0], 1.0, 0.0),
        (GOOD, math.nan, 0.0),
        (GOOD, -math.inf, 0.0),
        (GOOD, 1.0, 1.0),
    ],
)
def test_a_bad_step_is_skipped(place, control_rows, law, telemetry, loss, found_inf):
    good, _ = run(place, control_rows(1, **UNSTARTED), law, noisy(5, 4), [1.0] * 5)
    ours, reference = run(place, good, law, [telemetry], [loss], [found_inf])
    changed = [i for i in range(L.NUM_SLOTS) if ours[0, i] != good[0, i] and not ours[0, i].isnan()]
    assert set(changed) <= {L.SKIPPED, L.SKIP, L.GRAD_NORM, L.NONFINITE}
    assert ours[0, L.SKIP] == 1
    assert ours[0, L.SKIPPED] == 1
    assert_close(ours, reference)
    resumed, reference = run(place, ours, law, noisy(3, 5), [1.0] * 3, [0.0] * 3)
    assert resumed[0, L.SKIP] == 0
    assert resumed[0, L.STEP] == 8
    assert_close(resumed, reference)


@pytest.mark.parametrize("scale", [math.inf, math.nan, 0.0])
def test_a_scale_that_is_no_number_is_a_bad_step(place, control_rows, scale):
    """1 / scale is 0, NaN or infinite: gradients that are not finite stay so."""
    start, _ = run(place, control_rows(1, **UNSTARTED), "meta3", noisy(3, 4), [1.0] * 3)
    ours, _ = run(place, start, "meta3", [[math.inf, math.inf, 1.0, 0.0]], None, grad_scale=scale)
    assert ours[0, L.SKIP] == 1
    assert ours[0, L.STEP] == start[0, L.STEP]


def test_partial_sums(place, control_rows):
    rows = torch.rand(3000, 4, device=place.device) * 1e-3
    rows[:, 3] = 0
    total = torch.stack([rows[:, 0].sum(), rows[:, 1].sum(), rows[:, 2].amax(), rows[:, 3].sum()])
    one, other = (control_rows(1, device=place.device, **UNSTARTED) for _ in range(2))
    control_step(one, rows, backend=place.backend)
    control_step(other, total, backend=place.backend)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, equal_nan=True)
    rows[2999, 3] = 1
    control_step(one, rows, backend=place.backend)
    assert one[0, L.SKIP] == 1


def test_no_gradients_here(place, control_rows):
    """A rank whose shards are empty has no rows, and adds nothing."""
    empty = gradient_telemetry([torch.zeros(0, device=place.device)], partial=True, backend=place.backend)
    nothing = torch.zeros((0, L.NUM_TELEMETRY), device=place.device)
    results = []
    for telemetry in (empty, nothing, combine(nothing), torch.zeros(4, device=place.device)):
        results.append(control_rows(1, device=place.device, **UNSTARTED))
        control_step(results[-1], telemetry, backend=place.backend)
        assert results[-1][0, L.SKIP] == 0
    assert all(torch.equal(results[0].nan_to_num(7), other.nan_to_num(7)) for other in results)


def test_same_bits_twice(place, control_rows):
    a, b = (run(place, control_rows(1, **UNSTARTED), "meta3", noisy(10, 6), [1.0] * 10)[0] for _ in range(2))
    assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    law=st.sampled_from(list(L.LAWS)),
    scale=st.sampled_from([1e-12, 1e-6, 1.0, 1e6, 1e12]),
    seed=st.integers(0, 1000),
    beta2=st.sampled_from([0.9, 0.95, 0.99, 0.999, 0.9999]),
)
def test_gradients_of_any_scale(place, control_rows, law, scale, seed, beta2):
    start = control_rows(1, **UNSTARTED, BETA2=beta2)
    telemetries = [[a * scale**1.5, b * scale**2, c * scale, 0.0] for a, b, c, _ in noisy(15, seed)]
    assert_close(*run(place, start, law, telemetries, [2.0 + 0.01 * (i % 3) for i in range(15)]))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 0.85, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("t", [1.0, 2.0, 100.0, 1e5])
def test_bias_corrections(place, control_rows, beta, t):
    """1 - beta^t, relative error below 3e-6 where fp32's own log and pow lose everything."""
    start = control_rows(1, device=place.device, **{**UNSTARTED, "AGE": t - 1, "META_BETA2": beta, "STEP": t - 1})
    control_step(start, torch.tensor(GOOD, device=place.device), law="meta3", backend=place.backend)
    row = start[0].double().cpu()
    for slot, power in ((L.BIAS_CORRECTION1, 1), (L.BIAS_CORRECTION2_SQRT, 2)):
        used = row[L.BETA1_OUT if power == 1 else L.BETA2_OUT].item()
        assert row[slot].item() ** power == pytest.approx(1 - used**t, rel=3e-6)


def test_a_learning_rate_of_0_stays_0_under_the_packages_clamp(place):
    control = new_control(2, device=place.device, bounds=None)
    control[0, L.LR], control[1, L.LR] = 0, 1e-9
    control_step(control, torch.tensor(GOOD, device=place.device), backend=place.backend)
    assert control[0, L.LR_OUT] == 0
    assert control[1, L.LR_OUT].item() == pytest.approx(1e-7)


@pytest.mark.parametrize("unaligned", [False, True])
def test_a_loss_at_any_address(place, control_rows, unaligned):
    """A loss may be one element of a tensor, of another floating-point dtype, of shape () or (1,)."""
    results = []
    for loss in (torch.tensor([9.0, 2.5])[1], torch.tensor([2.5]), torch.tensor(2.5, dtype=torch.float64),
                 torch.tensor(2.5).half()):  # fmt: skip
        control = control_rows(1, device=place.device, **UNSTARTED)
        value = loss.to(place.device)
        if unaligned:
            value = torch.stack([value.reshape(()) * 0, value.reshape(())])[1]
        control_step(control, torch.tensor(GOOD, device=place.device), value, backend=place.backend)
        assert control[0, L.LOSS] == 2.5
        results.append(control)
    assert all(torch.equal(results[0], other) for other in results)


@each_law
def test_the_log_has_the_last_steps(place, control_rows, law):
    """Row 0 of every step, skipped ones too, in turn; and the log changes nothing else."""
    control, plain = (control_rows(2, device=place.device, **UNSTARTED) for _ in range(2))
    log = torch.full((4, L.NUM_SLOTS), 7.0, device=place.device)
    guard = log.clone()
    for i, values in enumerate(noisy(7, 8)):
        telemetry = torch.tensor([*values[:3], 1.0 if i in (2, 5) else 0.0], device=place.device)
        control_step(control, telemetry, law=law, log=log[:3], backend=place.backend)
        control_step(plain, telemetry, law=law, backend=place.backend)
        guard[i % 3] = plain[0]
        assert torch.equal(control.nan_to_num(7), plain.nan_to_num(7))
        assert torch.equal(log.nan_to_num(7), guard.nan_to_num(7))
    assert control[0, L.SKIPPED] == 2


# -- a fresh vector ------------------------------------------------------------------------------------------


def test_a_new_control_vector(place):
    control = new_control(3, lr=2e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3, gamma=2.0, meta_lr_eta=0.1,
                          meta_lr_beta2=0.2, meta_interval=5, bounds=(0.5, 2.0), guard=False, maximize=True, seed=9,
                          device=place.device).cpu()  # fmt: skip
    assert control.shape == (3, L.NUM_SLOTS)
    assert control.is_contiguous()
    named = {"LR": 2e-3, "WEIGHT_DECAY": 0.3, "BETA1": 0.8, "BETA2": 0.95, "EPS": 1e-6, "GAMMA": 2.0,
             "META_LR_ETA": 0.1, "META_LR_BETA2": 0.2, "META_INTERVAL": 5, "SCALE_MIN": 0.5, "SCALE_MAX": 2.0,
             "LR_MIN": -math.inf, "LR_MAX": math.inf, "GUARD": 0, "MAXIMIZE": 1, "SEED": 9,
             "LR_SCALE": 1, "META_BETA2": 0.95}  # fmt: skip
    wanted = torch.zeros(L.NUM_SLOTS)
    for name, value in named.items():
        wanted[getattr(L, name)] = value
    assert torch.equal(control, wanted.expand(3, -1))
    assert torch.equal(torch.tensor(control_inputs(lr=2e-3)), new_control(lr=2e-3)[0, : L.NUM_INPUTS])
    unbounded = new_control(bounds=None)[0]
    assert [unbounded[slot].item() for slot in (L.SCALE_MIN, L.SCALE_MAX)] == [-math.inf, math.inf]
    assert [unbounded[slot].item() for slot in (L.LR_MIN, L.LR_MAX)] == pytest.approx([1e-7, 1e-2])
