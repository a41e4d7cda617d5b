"""The PyTorch reference against the formulas in float64, and against torch.optim where they coincide."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cruxy_kernels import adamw_update_, control_step, gradient_telemetry, lion_update_
from cruxy_kernels import layout as L
from cruxy_kernels.codec_reference import dequantize_blockwise, quantize_blockwise
from cruxy_kernels.pieces import PIECE_CPU
from cruxy_kernels.rounding_reference import random_bits, round_stochastic

SHAPES = [(), (1,), (127,), (128,), (3, 43), (0,), (5, 0), (2048,), (65_537,), (2, 3, 5, 7)]


def tensors(shapes=SHAPES, seed=0, scale=1.0, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def control(rows: int = 1, **slots: float) -> torch.Tensor:
    """A control tensor before its first step, with plain settings; keyword arguments set slots by name."""
    c = torch.zeros(rows, L.NUM_SLOTS)
    values = {"LR": 1e-3, "BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8, "GAMMA": 1.5, "META_LR_ETA": 0.05,
              "META_LR_BETA2": 0.03, "META_INTERVAL": 10, "SCALE_MIN": 0.1, "SCALE_MAX": 4.0, "LR_SCALE": 1,
              "LR_MIN": -math.inf, "LR_MAX": math.inf, "META_BETA2": 0.999, "CLIP_COEF": 1} | slots  # fmt: skip
    for name, value in values.items():
        c[:, getattr(L, name)] = value
    return c


# -- telemetry ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0, 2.7, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_telemetry_is_the_formula(gamma, dtype):
    grads = tensors(dtype=dtype)
    exact = torch.cat([g.double().reshape(-1).abs() for g in grads])
    expected = torch.stack([exact.pow(gamma).sum(), exact.square().sum(), exact.max(), exact.new_zeros(())])
    # fp32 sums of 70,000 terms in a tree: 1e-6 is 8 roundings.
    torch.testing.assert_close(gradient_telemetry(grads, gamma=gamma).double(), expected, rtol=1e-6, atol=0)


def test_gamma_of_2_is_the_l2_norm():
    out = gradient_telemetry(tensors(), gamma=2.0)
    assert out[L.SUM_POW] == out[L.SUM_SQ]


def test_telemetry_a_tensor_adds_up_to_the_total():
    grads = tensors()
    rows, total = gradient_telemetry(grads, per_tensor=True), gradient_telemetry(grads)
    assert rows.shape == (len(grads), L.NUM_TELEMETRY)
    torch.testing.assert_close(rows[:, : L.MAX_ABS].sum(0), total[: L.MAX_ABS], rtol=1e-6, atol=0)
    assert rows[:, L.MAX_ABS].max() == total[L.MAX_ABS]
    largest = grads[8]
    torch.testing.assert_close(rows[8, L.SUM_SQ], largest.square().sum(), rtol=1e-6, atol=0)


def test_only_finite_elements_enter_the_sums():
    grads = tensors()
    clean = gradient_telemetry(grads)
    dirty = [g.clone() for g in grads]
    dirty.append(torch.tensor([math.nan, math.inf, -math.inf]))
    out = gradient_telemetry(dirty)
    assert out[L.COUNT_NONFINITE] == 3
    torch.testing.assert_close(out[:3], clean[:3], rtol=1e-6, atol=0)


def test_telemetry_unscales():
    grads, scale = tensors(), torch.tensor([1024.0])
    out = gradient_telemetry([g * scale for g in grads], grad_scale=scale)
    torch.testing.assert_close(out, gradient_telemetry(grads), rtol=1e-6, atol=0)


def test_telemetry_does_not_overflow_in_half_precision():
    out = gradient_telemetry([torch.full((10,), 65504.0, dtype=torch.float16)])
    torch.testing.assert_close(out[L.SUM_SQ].item(), 10 * 65504.0**2, rtol=1e-6, atol=0)
    tiny = gradient_telemetry([torch.full((1000,), 6e-8, dtype=torch.float16)])  # the smallest subnormal
    torch.testing.assert_close(tiny[L.SUM_SQ].item(), 1000 * (2.0**-24) ** 2, rtol=1e-6, atol=0)


def test_same_bits_twice():
    grads = tensors(seed=5)
    assert torch.equal(gradient_telemetry(grads), gradient_telemetry(grads))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), max_size=40), min_size=1, max_size=6)
)
def test_telemetry_of_any_values(values):
    grads = [torch.tensor(v, dtype=torch.float32) for v in values]
    flat = torch.cat(grads).double().abs()
    finite = flat[flat.isfinite()]
    out = gradient_telemetry(grads).double()
    assert out[L.COUNT_NONFINITE] == len(flat) - len(finite)
    assert out[L.MAX_ABS] == (finite.max() if len(finite) else 0)
    sum_sq = finite.square().sum()
    if sum_sq > torch.finfo(torch.float32).max:
        assert out[L.SUM_SQ] == math.inf
    else:
        # squares below fp32's smallest number are lost: 1.4e-45 a term
        torch.testing.assert_close(out[L.SUM_SQ], sum_sq, rtol=1e-5, atol=1.4e-45 * max(1, len(finite)))


def test_telemetry_refuses_bad_arguments():
    with pytest.raises(ValueError, match="gamma"):
        gradient_telemetry(tensors(), gamma=0.5)
    with pytest.raises(ValueError, match="no gradients"):
        gradient_telemetry([])


# -- control -----------------------------------------------------------------------------------------------


class Law:
    """equations.md section 2 in Python floats, written from the text: the oracle of control_step."""

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


@pytest.mark.parametrize("with_loss", [True, False])
@pytest.mark.parametrize("law", list(L.LAWS))
def test_control_is_the_law(law, with_loss):
    """200 steps of signals that rise, fall and jump, with two rows of different settings."""
    c = control(2)
    c[1, L.LR], c[1, L.BETA1], c[1, L.BETA2], c[1, L.META_BETA2] = 3e-4, 0.92, 0.95, 0.95
    oracles = [Law(law, 1e-3, 0.9, 0.999, (0.1, 4.0)), Law(law, 3e-4, 0.92, 0.95, (0.1, 4.0))]
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        level = math.exp(math.sin(step / 20)) * (5 if step in (70, 71) else 1)
        g = level * torch.rand(50, generator=generator).double() * 0.3
        sums = (g.pow(1.5).sum().item(), g.square().sum().item())
        loss = 2 + math.cos(step / 7) + 0.1 * level if with_loss else None
        telemetry = torch.tensor([*sums, g.max().item(), 0.0])
        control_step(c, telemetry, None if loss is None else torch.tensor(loss), law=law)
        for row, oracle in enumerate(oracles):
            for name, value in oracle.step(*sums, loss).items():
                # fp32 state over 200 steps of EMAs; the tanh of beta1 has slope 20 in the curvature
                got = c[row, getattr(L, name)].item()
                assert got == pytest.approx(value, rel=5e-5), f"{name} of row {row} in step {step}"
            t = step + 1
            corrections = 1 - c[row, L.BETA1_OUT].double() ** t, (1 - c[row, L.BETA2_OUT].double() ** t).sqrt()
            assert c[row, L.BIAS_CORRECTION1].item() == pytest.approx(corrections[0].item(), rel=1e-5)
            assert c[row, L.BIAS_CORRECTION2_SQRT].item() == pytest.approx(corrections[1].item(), rel=1e-5)
    assert c[0, L.STEP] == 200


@pytest.mark.parametrize("law", list(L.LAWS))
@pytest.mark.parametrize("cause", ["gradient", "overflow", "loss", "found_inf"])
def test_a_bad_step_leaves_the_state(law, cause):
    c = control()
    good = torch.tensor([1.0, 1.0, 1.0, 0.0])
    for _ in range(3):
        control_step(c, good, torch.tensor(1.0), law=law)
    before = c.clone()
    telemetry, loss, found_inf = good.clone(), torch.tensor(2.0), None
    if cause == "gradient":
        telemetry[L.COUNT_NONFINITE] = 1
    elif cause == "overflow":
        telemetry[L.SUM_SQ] = math.inf
    elif cause == "loss":
        loss = torch.tensor(math.nan)
    else:
        found_inf = torch.tensor([1.0])
    control_step(c, telemetry, loss, law=law, found_inf=found_inf)
    assert c[0, L.SKIP] == 1
    assert c[0, L.SKIPPED] == 1
    state = [i for i in range(L.NUM_INPUTS, L.OUTPUTS) if i != L.SKIPPED]
    assert torch.equal(c[:, state], before[:, state])
    control_step(c, good, torch.tensor(1.0), law=law)
    assert c[0, L.SKIP] == 0
    assert c[0, L.STEP] == 4


def test_a_learning_rate_of_0_stays_0_under_the_seeds_clamp():
    c = control(2, LR_MIN=1e-7, LR_MAX=1e-2)
    c[0, L.LR] = 0
    c[1, L.LR] = 1e-9
    control_step(c, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert c[0, L.LR_OUT] == 0
    assert c[1, L.LR_OUT].item() == pytest.approx(1e-7)


def test_the_early_warning_halves_the_rate_once_an_interval():
    """W = .5 [surge] + .2 [curvature] reaches .7 when the level triples while the loss climbs steeply."""
    c = control(GUARD=1, SCALE_MIN=1e-12)
    halvings, scale = 0, 1.0
    for step in range(330):
        level = 1.0 if step < 300 else 3.9
        control_step(
            c, torch.tensor([level**1.5, level**2, level, 0.0]), torch.tensor(float(step * 20)), law="stability_v2"
        )
        new = c[0, L.LR_SCALE].item()
        halvings += new < 0.6 * scale
        scale = new
    assert c[0, L.WARNINGS] > 5
    assert 1 <= halvings <= 2


def test_control_refuses_bad_arguments():
    with pytest.raises(ValueError, match="unknown law"):
        control_step(control(), torch.zeros(4), law="meta4")
    with pytest.raises(ValueError, match="shape"):
        control_step(control(), torch.zeros(3))


# -- updates -----------------------------------------------------------------------------------------------


def stepped(**slots: float) -> torch.Tensor:
    """A control tensor as a step leaves it for the updates."""
    outputs = {"LR_OUT": 1e-2, "BETA1_OUT": 0.9, "BETA2_OUT": 0.99, "CLIP_COEF": 0.25, "WEIGHT_DECAY": 0.1,
               "BIAS_CORRECTION1": 0.3, "BIAS_CORRECTION2_SQRT": 0.2, "STEP": 4} | slots  # fmt: skip
    return control(**outputs)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("multiplied", [False, True])
def test_lion_is_the_formula(maximize, multiplied):
    p, g, m = tensors(seed=1), tensors(seed=2, scale=512), tensors(seed=3)
    factors = torch.linspace(0.3, 1.7, len(p)) if multiplied else None
    expected = []
    for i, (p_, g_, m_) in enumerate(zip(p, g, m, strict=True)):
        x, mm = p_.double(), m_.double()
        gg = 0.25 * g_.double() / 512 * (-1 if maximize else 1)
        u = torch.sign(0.9 * mm + 0.1 * gg)
        step = 1e-2 * (1 if factors is None else factors[i].double())
        expected.append((x - step * u - 1e-2 * 0.1 * x, 0.99 * mm + 0.01 * gg))
    lion_update_(p, g, m, stepped(), grad_scale=torch.tensor(512.0), maximize=maximize, lr_multipliers=factors)
    for got, (x, _) in zip(p, expected, strict=True):
        torch.testing.assert_close(got.double(), x, rtol=1e-6, atol=1e-7)
    for got, (_, mm) in zip(m, expected, strict=True):
        torch.testing.assert_close(got.double(), mm, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_is_the_formula(nesterov, decoupled, maximize):
    p, g, m, v = tensors(seed=1), tensors(seed=2), tensors(seed=3), [t.square() for t in tensors(seed=4)]
    factors = torch.linspace(0.3, 1.7, len(p))
    beta2 = stepped()[0, L.BETA2_OUT].double()  # 1 - .99 in fp32 is .01 to 2e-6
    expected = []
    for i, (p_, g_, m_, v_) in enumerate(zip(p, g, m, v, strict=True)):
        x, gg = p_.double(), 0.25 * g_.double() * (-1 if maximize else 1)
        if not decoupled:
            gg = gg + 0.1 * x
        mm = 0.9 * m_.double() + 0.1 * gg
        vv = beta2 * v_.double() + (1 - beta2) * gg**2
        n = 0.9 * mm + 0.1 * gg if nesterov else mm
        if decoupled:
            x = x * (1 - 1e-2 * 0.1)
        expected.append((x - factors[i].double() * 1e-2 * 0.2 / 0.3 * n / (vv.sqrt() + 1e-8), mm, vv))
    adamw_update_(
        p, g, m, v, stepped(), nesterov=nesterov, decoupled=decoupled, maximize=maximize, lr_multipliers=factors
    )
    for got, want in zip(zip(p, m, v, strict=True), expected, strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=3e-7)


def test_adamw_coincides_with_torch():
    """No clipping, no Nesterov, a constant rate: torch.optim.AdamW with an epsilon that does not show."""
    ours, theirs = tensors(seed=1), [torch.nn.Parameter(t) for t in tensors(seed=1)]
    m, v = ([torch.zeros_like(p) for p in ours] for _ in range(2))
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), eps=1e-20, weight_decay=0.1)
    for t in range(1, 11):
        grads = tensors(seed=10 + t)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g
        optimizer.step()
        c = stepped(CLIP_COEF=1, EPS=1e-20, BIAS_CORRECTION1=1 - 0.9**t, BIAS_CORRECTION2_SQRT=math.sqrt(1 - 0.99**t))
        adamw_update_(ours, grads, m, v, c, nesterov=False)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-6)


def test_rows_serve_their_tensors():
    p, g, m = tensors(seed=1), tensors(seed=2), tensors(seed=3)
    c = torch.cat([stepped(), stepped(LR_OUT=0.0, WEIGHT_DECAY=0.0), stepped(LR_OUT=5e-2)])
    rows = [i % 3 for i in range(len(p))]
    together, ms = [t.clone() for t in p], [t.clone() for t in m]
    lion_update_(together, g, ms, c, rows=rows)
    for i, row in enumerate(rows):
        alone, m_alone = [p[i].clone()], [m[i].clone()]
        lion_update_(alone, [g[i]], m_alone, c[row : row + 1])
        assert torch.equal(alone[0], together[i])
        assert torch.equal(m_alone[0], ms[i])
        assert row != 1 or torch.equal(together[i], p[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
def test_skip_keeps_every_bit(dtype, value):
    """Negative zeros, NaN and denormals included, in parameters, momentum and codes."""
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-7, 3.0, 65504.0, -(2.0**-24), math.inf] * 20).to(dtype)
    p, g = [special.clone(), special.reshape(2, 80).clone()], [torch.full((160,), value), torch.full((2, 80), value)]
    m, v = ([t.float() for t in p] for _ in range(2))
    c = stepped(SKIP=1, CLIP_COEF=math.nan)
    codes, scales = map(list, zip(*(quantize_blockwise(t.nan_to_num(posinf=1.0)) for t in m), strict=True))
    lists = (p, m, v, codes, scales)
    before = [[t.clone().view(torch.uint8) for t in ts] for ts in lists]
    lion_update_(p, g, m, c)
    adamw_update_(p, g, m, v, c)
    lion_update_(p, g, codes, c, exp_avg_scales=scales)
    after = [[t.view(torch.uint8) for t in ts] for ts in lists]
    assert all(torch.equal(a, b) for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))


def test_layouts_that_are_not_contiguous():
    base = tensors([(40, 30)], seed=1)[0]
    p = [base.t(), base[::2, 1::3].clone().t(), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    p.append(torch.randn(300, 2 * PIECE_CPU // 300).t())  # longer than a piece
    g = [torch.randn(t.shape) for t in p]
    expected = [t - 1e-2 * (torch.sign(0.1 * 0.25 * h) + 0.1 * t) for t, h in zip(p, g, strict=True)]
    lion_update_(p, g, [torch.zeros_like(t) for t in p], stepped())
    for got, want in zip(p, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(base.t(), expected[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shapes", [SHAPES, [(3 * PIECE_CPU + 77,)], [(1,)] * 200])
def test_8_bit_momentum_is_the_codec_around_the_fp32_update(shapes):
    p, g, m = tensors(shapes, seed=1), tensors(shapes, seed=2), tensors(shapes, seed=3, scale=1e-3)
    codes, scales = map(list, zip(*(quantize_blockwise(t) for t in m), strict=True))
    q = [t.clone() for t in p]
    exact = [dequantize_blockwise(a, b) for a, b in zip(codes, scales, strict=True)]
    lion_update_(q, g, exact, stepped())
    lion_update_(p, g, codes, stepped(), exp_avg_scales=scales)
    for a, b in zip(p, q, strict=True):
        assert torch.equal(a, b)
    for a, b, want in zip(codes, scales, exact, strict=True):
        again = quantize_blockwise(want)
        assert torch.equal(a, again[0])
        assert torch.equal(b, again[1])


# -- stochastic rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_right_on_average_and_never_further_than_a_neighbour(dtype):
    values = torch.cat([torch.linspace(-2, 2, 41), torch.tensor([1e-6, 3.3e-5, -5e-8, 1000.3])])
    random = torch.stack([random_bits(torch.tensor(t), [0], [len(values)]) for t in range(4000)])
    rounded = round_stochastic(values.expand(4000, -1).contiguous(), random, dtype)
    assert rounded.dtype == dtype
    gap = (torch.finfo(dtype).eps * values.abs()).clamp(min=2.0**-24 if dtype == torch.float16 else 0)
    error = rounded.double().mean(0) - values.double()
    assert bool((error.abs() <= 0.05 * gap + 1e-12).all())  # 4,000 draws: standard error 0.008 of a gap
    assert bool(((rounded.float() - values).abs() <= gap).all())


def test_representable_values_survive_rounding_and_large_ones_saturate():
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.tensor([0.0, -0.0, 1.0, -0.5, torch.finfo(dtype).max, torch.finfo(dtype).tiny, math.inf])
        random = torch.full((len(values),), -1, dtype=torch.int32)
        kept = round_stochastic(values, random, dtype).float()
        assert torch.equal(kept, values)
        assert torch.equal(kept.signbit(), values.signbit())
    top = round_stochastic(torch.tensor([1e6, -1e6]), torch.full((2,), -1, dtype=torch.int32), torch.float16)
    assert top.tolist() == [65504.0, -65504.0]


def test_random_bits_differ_by_step_tensor_and_element():
    step = torch.tensor(3.0)
    both = random_bits(step, [0, 7], [5, 6])
    assert torch.equal(both[:5], random_bits(step, [0], [5]))
    assert torch.equal(both[5:], random_bits(step, [7], [6]))
    assert torch.equal(random_bits(step, [7], [3], start=3), both[8:])
    assert not torch.equal(random_bits(step, [0], [5]), random_bits(step, [1], [5]))
    assert not torch.equal(random_bits(step, [0], [5]), random_bits(step + 1, [0], [5]))
    bits = random_bits(step, [0], [100_000])
    shares = [((bits >> k) & 1).float().mean().item() for k in range(32)]
    assert max(abs(share - 0.5) for share in shares) < 0.01
