"""Every update rule on every backend against its formula in float64; the formulas are in rules/*.py."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from cases import CODEC_CASES, ROUNDINGS, RULE_CASES, draws, neighbours, rounded, row_values, wide
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cruxy_kernels import (
    CODECS,
    RULES,
    control_step,
    gradient_telemetry,
    new_control,
    quantize_blockwise,
    update_,
)
from cruxy_kernels import layout as L
from cruxy_kernels.backends import native
from cruxy_kernels.backends.pieces import PIECE_CPU

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SIZES = (0, 1, 63, 64, 65, 127, 128, 129, 1024, 1089, 2048)
PAIRS = [("float32", "float32"), ("float32", "float16"), ("float32", "bfloat16"), ("float16", "float16"),
         ("float16", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]  # fmt: skip
HYPOTHESIS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}

each_rule = pytest.mark.parametrize("rule", RULE_CASES)
each_storage = pytest.mark.parametrize(
    ("rule", "kept"), [(name, kept) for name, case in RULE_CASES.items() for kept in case.STORAGE]
)


def test_every_rule_has_its_case():
    """A rule without a formula here, or a formula that leaves out a switch or a storage of its rule, is untested."""
    assert set(RULE_CASES) == set(RULES)
    for name, case in RULE_CASES.items():
        rule = RULES[name]
        assert tuple(case.STATE) == rule.state
        assert dict(rule.flags) == case.FLAGS
        assert {FLOATS[kept] for kept in case.STORAGE if kept in FLOATS} == set(rule.storage)
        assert {32, *(kept for kept in case.STORAGE if kept not in FLOATS)} == set(rule.state_bits)
    assert set(CODEC_CASES) == {name for name, codec in CODECS.items() if codec.block}
    for rule in RULES.values():
        for bits in rule.state_bits:  # the bits that the parameters leave are enough for one
            assert sum(codec.random for codec in rule.codecs(bits)) <= 1
        for buffer in range(len(rule.state)):  # by which a state is recognised
            dtypes = [rule.codecs(bits)[buffer].dtype for bits in rule.state_bits]
            assert len(set(dtypes)) == len(dtypes)
    assert {name for rule in RULES.values() for names in rule.state_bits.values() for name in names} == set(CODECS)


# -- a step and its oracle -----------------------------------------------------------------------------------


def randn(shapes, seed, device="cpu", dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(device, dtype) for shape in shapes]


def codec_of(rule, bits, name):
    return RULES[rule].codecs(bits)[RULES[rule].state.index(name)]


def make_state(rule, kept, values, device):
    """The state of a rule whose buffers hold about `values` (a list of lists of fp32 tensors), kept as `kept`."""
    state = {}
    for name, tensors in zip(RULE_CASES[rule].STATE, values, strict=True):
        tensors = [t.abs() if name.endswith("_sq") else t for t in tensors]
        if kept in FLOATS:
            state[name] = [t.to(device, FLOATS[kept]) for t in tensors]
        else:
            pairs = [codec_of(rule, kept, name).encode(t) for t in tensors]
            state[name] = [codes.to(device) for codes, _ in pairs]
            state[name + "_scale"] = [scales.to(device) for _, scales in pairs]
    return state


class Step:
    """Parameters, gradients and state of one rule; `run` steps a backend, `check` compares with the formula."""

    def __init__(self, rule, place, shapes=SIZES, pair=("float32", "float32"), kept="float32", seed=0):
        self.rule, self.place, self.kept, self.case = rule, place, kept, RULE_CASES[rule]
        device = place.device
        self.params = randn(shapes, seed + 1, device, FLOATS[pair[0]])
        self.grads = randn(shapes, seed + 2, device, FLOATS[pair[1]])
        buffers = [randn(shapes, seed + 3 + i, scale=0.3) for i in range(len(self.case.STATE))]
        self.state = make_state(rule, kept, buffers, device)

    def tensors(self):
        return [*self.params, *[t for buffers in self.state.values() for t in buffers]]

    def bits(self):
        copies = [torch.empty(t.numel(), dtype=t.dtype).copy_(t.reshape(-1)) for t in [*self.tensors(), *self.grads]]
        return [t.view(torch.uint8) for t in copies]

    def values(self, name, i):
        """A state buffer as float64."""
        if self.kept in FLOATS:
            return wide(self.state[name][i])
        codec, shape = codec_of(self.rule, self.kept, name), self.params[i].shape
        case, numel = CODEC_CASES[codec.name], shape.numel()
        spread = wide(self.state[name + "_scale"][i]).repeat(codec.block)[:numel]
        return case.value(case.unpack(wide(self.state[name][i]).reshape(-1), numel), spread).reshape(shape)

    def run(self, control, **arguments):
        """False where the compiled loops do not have the rule: they say so and touch nothing."""
        self.before = [
            (wide(p), wide(g), [self.values(name, i) for name in self.case.STATE])
            for i, (p, g) in enumerate(zip(self.params, self.grads, strict=True))
        ]
        bits = self.bits()
        try:
            update_(self.rule, self.params, self.grads, self.state, control, backend=self.place.backend, **arguments)
        except TypeError as error:
            assert str(error).startswith(f"backend 'native' cannot serve the rule {self.rule}")  # noqa: PT017
            assert self.rule not in native.RULES_SERVED
            assert all(torch.equal(a, b) for a, b in zip(bits, self.bits(), strict=True))
            return False
        return True

    def check(self, control, *, rows=None, ids=None, lr_multipliers=None, ordinary=True, **flags):
        """Everything against the formula; `ordinary` values leave hardly a sign undecided."""
        for i, (p, g, state) in enumerate(self.before):
            c = row_values(control, 0 if rows is None else rows[i])
            multiplier = 1.0 if lr_multipliers is None else lr_multipliers[i].item()
            wanted, decided = self.case.formula(p, g * c.factor, state, c, multiplier, {**self.case.FLAGS, **flags})
            assert not ordinary or decided.size < 100 or decided.mean() > 0.99
            self.check_param(i, wanted["param"], decided, c, i if ids is None else ids[i])
            for name in self.case.STATE:
                self.check_state(name, i, *wanted[name], c, i if ids is None else ids[i])

    def check_param(self, i, wanted, decided, c, number):
        (value, terms), dtype = wanted, self.params[i].dtype
        found, bound = wide(self.params[i])[decided], (ROUNDINGS * terms + 1e-37)[decided]
        if dtype == torch.float32:
            assert_within(found, value[decided], bound)
            return
        flat = value.reshape(-1)
        expected = rounded(flat, draws(int(c.seed), int(c.step), number, flat.size), dtype).reshape(value.shape)
        expected, gap = expected[decided], neighbours(value[decided], dtype)[1]
        # The same random bits; only where a value lies on the border of its bits may they differ, by one gap.
        assert_within(found, value[decided], gap + bound)
        assert (found != expected).sum() <= 2 + 2e-3 * found.size

    def check_state(self, name, i, value, terms, c, number):
        found, bound = self.values(name, i), ROUNDINGS * terms + 1e-37
        if self.kept in ("float16", "bfloat16"):
            assert_within(found, value, 0.5 * neighbours(value, FLOATS[self.kept])[1] + bound)
        elif self.kept == "float32":
            assert_within(found, value, bound)
        else:
            codec, random = codec_of(self.rule, self.kept, name), None
            if codec.random:
                random = draws(int(c.seed), int(c.step), number, value.size)
            check_codes(codec, self.state[name][i], self.state[name + "_scale"][i], value, bound, random)


def assert_within(found, wanted, bound):
    assert found.shape == wanted.shape
    error = np.abs(found - wanted)
    assert (error <= bound).all(), f"{(error / bound).max()} times the bound"


def check_codes(codec, codes, scales, value, bound, random):
    """Codes and scales are those of `value`, give or take what `bound` moves it by."""
    case, block = CODEC_CASES[codec.name], codec.block
    value, bound = value.reshape(-1), bound.reshape(-1)
    codes = case.unpack(wide(codes).reshape(-1), value.size)
    spread = wide(scales).repeat(block)[: value.size]
    for start in range(0, value.size, block):
        part, slack = np.abs(value[start : start + block]), bound[start : start + block].max()
        low, high = case.scale(np.array([part.max() - slack, part.max() + slack]))
        assert low <= spread[start] <= high
    low, _ = case.codes(np.maximum(np.abs(value) - bound, 0), spread, random)
    _, high = case.codes(np.abs(value) + bound, spread, random)
    assert ((low <= np.abs(codes)) & (np.abs(codes) <= high)).all()
    assert (codes * value >= 0).all()


def two_rows(control_rows, device, **slots):
    control = control_rows(2, device=device, **slots)
    control[1, L.LR_OUT], control[1, L.WEIGHT_DECAY], control[1, L.BETA2_OUT] = 5e-3, 0.0, 0.5
    control[1, L.GRAD_FACTOR], control[1, L.SEED] = -0.25, 12.0
    return control


# -- the formula ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
@each_storage
def test_dtypes_and_storage(place, control_rows, rule, kept, pair):
    step = Step(rule, place, pair=pair, kept=kept)
    control = two_rows(control_rows, place.device)
    rows, ids = [i % 2 for i in range(len(SIZES))], [1000 + 7 * i for i in range(len(SIZES))]
    if step.run(control, rows=rows, ids=ids):
        step.check(control, rows=rows, ids=ids)


@pytest.mark.parametrize(
    ("rule", "flags"),
    [
        (name, dict(zip(case.FLAGS, chosen, strict=True)))
        for name, case in RULE_CASES.items()
        for chosen in product((False, True), repeat=len(case.FLAGS))
    ],
)
@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize("several_rows", [False, True])
@pytest.mark.parametrize("factor", [0.6, -1 / 512])
def test_flags_rows_multipliers_and_sign(place, control_rows, rule, flags, multiplied, several_rows, factor):
    step = Step(rule, place, [5, 1500, (3, 43), ()])
    control = two_rows(control_rows, place.device, GRAD_FACTOR=factor)
    arguments = dict(flags)
    if multiplied:
        arguments["lr_multipliers"] = torch.tensor([0.3, 1.0, 1.7, 0.0], device=place.device)
    if several_rows:
        arguments["rows"] = [1, 0, 1, 0]
    if step.run(control, **arguments):
        step.check(control, **arguments)


@each_storage
def test_many_pieces(place, control_rows, rule, kept):
    """More elements than a program, a piece or a chunk of the loops takes, and a length that fits none of them."""
    step = Step(rule, place, [65_537], kept=kept)
    if step.run(control_rows(device=place.device)):
        step.check(control_rows())


@pytest.mark.slow
@each_storage
def test_a_million_and_three(place, control_rows, rule, kept):
    step = Step(rule, place, [1_000_003], kept=kept)
    if step.run(control_rows(device=place.device)):
        step.check(control_rows())


@each_rule
def test_300_small_tensors(place, control_rows, rule):
    step = Step(rule, place, [(1,)] * 200 + [(3, 5)] * 100 if place.backend != "triton" else [(1,)] * 60)
    if step.run(control_rows(device=place.device)):
        step.check(control_rows())


def test_no_tensors(place, control_rows):
    for rule, case in RULE_CASES.items():
        update_(rule, [], [], {name: [] for name in case.STATE}, control_rows(), backend=place.backend)


def served(place, rule):
    """The backend that serves the rule there: PyTorch, where the compiled loops do not have it."""
    return "torch" if place.backend == "native" and rule not in native.RULES_SERVED else place.backend


@each_rule
def test_float64_is_served_by_pytorch(place, control_rows, rule):
    step = Step(rule, place, [100, ()])
    step.params, step.grads = [t.double() for t in step.params], [t.double() for t in step.grads]
    step.state = {name: [t.double() for t in tensors] for name, tensors in step.state.items()}
    if place.backend != "torch":
        with pytest.raises(TypeError, match="float64" if served(place, rule) == place.backend else f"the rule {rule}"):
            update_(rule, step.params, step.grads, step.state, control_rows(), backend=place.backend)
        return
    assert step.run(control_rows(device=place.device))
    for (p, g, state), param in zip(step.before, step.params, strict=True):
        c = row_values(control_rows().double(), 0)
        wanted, _ = step.case.formula(p, g * c.factor, state, c, 1.0, step.case.FLAGS)
        np.testing.assert_allclose(wide(param), wanted["param"][0], rtol=1e-6)  # slots are fp32


@pytest.mark.parametrize("rule", [name for name, case in RULE_CASES.items() if hasattr(case, "peer")])
def test_ten_steps_of_somebody_elses(place, control_rows, rule):
    """No clipping, a constant rate, an epsilon that does not show."""
    device, shapes = place.device, [(), (3, 43), (2048,)]
    ours = randn(shapes, 1, device)
    theirs = [torch.nn.Parameter(t) for t in randn(shapes, 1, device)]
    state = {name: [torch.zeros_like(p) for p in ours] for name in RULE_CASES[rule].STATE}
    optimizer, flags = RULE_CASES[rule].peer(theirs, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for t in range(1, 11):
        grads = randn(shapes, 10 + t, device)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        control = control_rows(
            device=device, LR_OUT=1e-2, BETA1_OUT=0.9, BETA2_OUT=0.99, WEIGHT_DECAY=0.1, GRAD_FACTOR=1.0, EPS=1e-20,
            BIAS_CORRECTION1=1 - 0.9**t, BIAS_CORRECTION2_SQRT=math.sqrt(1 - 0.99**t),
        )  # fmt: skip
        update_(rule, ours, grads, state, control, backend=served(place, rule), **flags)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("maximize", [False, True])
@each_rule
def test_a_step_of_scaled_gradients_is_the_step_of_the_gradients(place, rule, maximize):
    """Unscaling, clipping and the sign go from the control step to the update, in one number."""
    results = []
    for scale in (None, 512.0):
        step = Step(rule, place, [700, 33])
        control = new_control(device=place.device, maximize=maximize, lr=1e-2)
        given = None if scale is None else torch.tensor([scale], device=place.device)
        step.grads = [g * (scale or 1.0) for g in step.grads]
        telemetry = gradient_telemetry(step.grads, partial=True, backend=place.backend)
        control_step(control, telemetry, grad_scale=given, backend=place.backend)
        coefficient = control[0, L.CLIP_COEF].item()
        assert 0 < coefficient < 1
        wanted = coefficient * (-1 if maximize else 1) / (scale or 1)
        assert control[0, L.GRAD_FACTOR].item() == pytest.approx(wanted, rel=1e-6)
        if not step.run(control):
            return
        step.check(control)
        results.append(step)
    for one, other in zip(results[0].tensors(), results[1].tensors(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@each_rule
def test_rows_serve_their_tensors(place, control_rows, rule):
    shapes = [7, (3, 43), 1500, (2, 3, 5), 64, 2]
    control = torch.cat([control_rows(), control_rows(LR_OUT=0.0, WEIGHT_DECAY=0.0), control_rows(LR_OUT=5e-2)])
    control, rows = control.to(place.device), [i % 3 for i in range(len(shapes))]
    step = Step(rule, place, shapes)
    if not step.run(control, rows=rows):
        return
    for i, row in enumerate(rows):
        alone = Step(rule, place, shapes)
        one = {name: [tensors[i]] for name, tensors in alone.state.items()}
        before = alone.params[i].clone()
        update_(rule, [alone.params[i]], [alone.grads[i]], one, control[row : row + 1], backend=place.backend)
        assert torch.equal(alone.params[i], step.params[i])
        assert all(torch.equal(one[name][0], step.state[name][i]) for name in one)
        assert row != 1 or torch.equal(before, step.params[i])


@each_rule
def test_a_coded_state_is_the_codec_around_the_update(place, control_rows, rule):
    for bits in [kept for kept in RULE_CASES[rule].STORAGE if kept not in FLOATS]:
        shapes = [(), (1,), (127,), (3, 43), (0,), (2048,)]
        shapes += [(3 * PIECE_CPU + 77,)] if place.backend != "triton" else [(4100,)]
        coded, plain = Step(rule, place, shapes, kept=bits), Step(rule, place, shapes)
        for name in RULE_CASES[rule].STATE:
            pairs, codec = zip(coded.state[name], coded.state[name + "_scale"], strict=True), codec_of(rule, bits, name)
            plain.state[name] = [codec.decode(c, s, p.shape) for (c, s), p in zip(pairs, plain.params, strict=True)]
        control = control_rows(device=place.device)
        if not (coded.run(control) and plain.run(control)):
            return
        assert all(torch.equal(a, b) for a, b in zip(coded.params, plain.params, strict=True))
        for name, i in product(RULE_CASES[rule].STATE, range(len(shapes))):
            codec, x = codec_of(rule, bits, name), plain.state[name][i]
            codes, scales = quantize_blockwise(x, codec=codec.name, backend=place.backend)
            if codec.random:
                c = row_values(control, 0)
                random = draws(int(c.seed), int(c.step), i, x.numel())
                random = torch.from_numpy(random.astype(np.uint32).view(np.int32)).to(x.device)
                codes, scales = codec.encode(x, random)
            assert torch.equal(codes, coded.state[name][i])
            assert torch.equal(scales, coded.state[name + "_scale"][i])


# -- 16-bit parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_steps_arrive_on_average(place, control_rows, dtype):
    """A step below half a gap for most elements: rounded to nearest it would be lost."""
    step = Step("lion", place, [3000, 70], (dtype, dtype))
    before = [p.float() for p in step.params]
    if not step.run(control_rows(device=place.device, LR_OUT=1e-4)):
        return
    moved = torch.cat([p.float() - old for p, old in zip(step.params, before, strict=True)])
    gap = torch.finfo(FLOATS[dtype]).eps * torch.cat(before).abs() + 6e-8
    assert (moved.abs() <= 1e-4 * 1.2 + gap).all()
    direction = torch.cat([torch.from_numpy(0.91 * m + 0.09 * 0.6 * g).sign() for _, g, (m,) in step.before])
    decay = 1e-4 * 0.1 * torch.cat(before)
    got = (moved.cpu() + decay.cpu()) * direction
    assert -got.mean().item() == pytest.approx(1e-4, rel=0.2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@each_rule
def test_random_bits_are_those_of_seed_step_and_id(place, control_rows, rule, dtype):
    """Two calls whose tensors have numbers of their own share no bits, and the seed is the user's."""

    def params(ids, **slots):
        step = Step(rule, place, [3000], (dtype, dtype))
        step.run(control_rows(device=place.device, LR_OUT=1e-4, **slots), ids=ids)
        return step.params[0]

    if not Step(rule, place, [9], (dtype, dtype)).run(control_rows(device=place.device)):
        return
    first = params([5])
    assert torch.equal(first, params([5]))
    assert torch.equal(params(None), params([0]))
    for other in (params([6]), params([5 + (1 << 30)]), params([5], SEED=12.0), params([5], STEP=4.0)):
        differ = (first != other).float().mean().item()
        assert differ > 0.01
    one, two = draws(11, 3, 0, 10_000), draws(11, 3, 1, 10_000)
    assert len(set(one.tolist()) & set(two.tolist())) < 5  # of 2^32: .02 expected


@each_rule
def test_a_list_in_any_order_rounds_the_same(place, control_rows, rule):
    def params(order):
        step = Step(rule, place, [700, 64, 130, 2000], ("bfloat16", "bfloat16"))
        p, g = [step.params[i] for i in order], [step.grads[i] for i in order]
        state = {name: [tensors[i] for i in order] for name, tensors in step.state.items()}
        control = control_rows(device=place.device)
        update_(rule, p, g, state, control, ids=[10 + i for i in order], backend=place.backend)
        return step.params

    if not Step(rule, place, [9]).run(control_rows(device=place.device)):
        return
    pairs = zip(params([0, 1, 2, 3]), params([2, 0, 3, 1]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value_is_kept(place, control_rows, dtype):
    """A step that changes nothing keeps every bit pattern of parameter and state, denormals and infinities too."""
    stored = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).to(place.device)
    p, m, g = stored.clone(), stored.clone(), torch.zeros_like(stored)
    control = control_rows(device=place.device, LR_OUT=0.0, WEIGHT_DECAY=0.0, BETA2_OUT=1.0)
    update_("lion", [p], [g], {"exp_avg": [m]}, control, backend=place.backend)
    number = ~stored.isnan()
    for found in (p, m):
        assert torch.equal(found.isnan(), ~number)
        assert torch.equal(found[number].float(), stored[number].float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_16_bit_state_is_rounded_to_nearest(place, control_rows, dtype):
    """Any fp32 bits: ties to even, denormals, beyond the largest; with beta2 = 0 the momentum is the gradient."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 30_000, dtype=np.uint32)
    ties = (np.random.default_rng(1).integers(0, 1 << 16, 10_000, dtype=np.uint32) << 16) | 0x8000
    half = torch.arange(0x7BFF, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    between = (half[:-1] + half[1:]) / 2  # ties of fp16
    edges = torch.tensor([65504.0, 65519.0, 65520.0, 65536.0, 2.0**-24, 2.0**-25, 2.0**-26, 3.39e38, 3.4e38])
    numbers = torch.from_numpy(np.concatenate([bits, ties]).view(np.float32).copy())
    g = torch.cat([numbers, between, -between, edges, -edges])
    g = g[~g.isnan()].to(place.device)
    m = torch.zeros(len(g), dtype=dtype, device=place.device)
    control = control_rows(device=place.device, BETA2_OUT=0.0, GRAD_FACTOR=1.0)
    update_("lion", [torch.zeros_like(g)], [g], {"exp_avg": [m]}, control, backend=place.backend)
    assert torch.equal(m.float(), g.to(dtype).float())


# -- what must not happen ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(FLOATS))
@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
@each_storage
def test_skip_changes_no_bit(place, control_rows, rule, kept, value, dtype):
    """Negative zeros, infinities and denormals included, in parameters and every state."""
    step = Step(rule, place, [160, (2, 80), 1500], (dtype, dtype), kept)
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-7, 3.0, 65504.0, -(2.0**-24), math.inf] * 20)
    step.params[0].copy_(special)
    if kept in FLOATS:
        for name in RULE_CASES[rule].STATE:
            step.state[name][1].copy_(special.reshape(2, 80))
    for g in step.grads:
        g.fill_(value)
    before = step.bits()
    step.run(control_rows(device=place.device, SKIP=1.0, GRAD_FACTOR=math.nan, CLIP_COEF=math.nan))
    assert all(torch.equal(a, b) for a, b in zip(before, step.bits(), strict=True))


# Quiet and signalling, both signs, every payload bit and one: 0x7fffffff is what CUDA makes.
NANS = [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001, 0xFF800001, 0x7FFF8000, 0x7F808000]


@each_storage
@pytest.mark.parametrize("dtype", list(FLOATS))
def test_what_is_not_finite_stays_visible(place, control_rows, rule, kept, dtype):
    """NaN and infinities of a gradient arrive in the state as such, and nothing else does."""
    bits = torch.tensor([n - (1 << 32) if n >> 31 else n for n in NANS], dtype=torch.int32)
    bad = torch.cat([bits.view(torch.float32), torch.tensor([math.inf, -math.inf])]).to(place.device)
    where = torch.arange(len(bad), device=place.device) * 64 + 5
    clean = torch.ones((len(bad) + 1) * 64, dtype=torch.bool, device=place.device)
    clean[where] = False
    step = Step(rule, place, [(len(bad) + 1) * 64], (dtype, "float32"), kept)
    step.grads[0][where] = bad
    step.grads[0].view(torch.int32)[where[: len(NANS)]] = bits.to(place.device)
    if not step.run(control_rows(device=place.device)):
        return
    for name in RULE_CASES[rule].STATE:
        value = torch.from_numpy(step.values(name, 0)).to(place.device)
        assert value[where[: len(NANS)]].isnan().all()
        assert not value[where].isfinite().any()
        if kept in FLOATS:
            assert value[where[len(NANS) :]].isinf().all()
            assert value[clean].isfinite().all()
        else:  # a block that holds one is all NaN
            assert value.view(-1, 64)[:-1].isnan().all()
        assert value[-64:].isfinite().all()
    assert step.params[0][clean].isfinite().all()


# (offset into the buffer, length): around 16-byte boundaries, blocks, programs and chunks.
PLACEMENTS = [(0, 1), (1, 63), (3, 64), (7, 65), (4, 1023), (0, 1024), (5, 1025), (64, 2047), (2, 129)]


@pytest.mark.parametrize("dtype", list(FLOATS))
@each_storage
def test_neighbours_of_a_view_keep_their_bits(place, control_rows, rule, kept, dtype):
    """Every tensor is cut out of a buffer; the cells before and behind it, and the gradients, are not written."""
    shapes = [length for _, length in PLACEMENTS]
    step = Step(rule, place, shapes, (dtype, dtype), kept)
    guards = []

    def embed(tensors):
        views = []
        for t, (offset, _) in zip(tensors, PLACEMENTS, strict=True):
            pattern = torch.arange(offset + t.numel() + 70, device=t.device, dtype=torch.int32) % 100
            buffer = pattern.to(t.dtype)
            buffer[offset : offset + t.numel()] = t
            views.append(buffer[offset : offset + t.numel()])
            guards.append((buffer, buffer.clone(), offset, t.numel()))
        return views

    step.params, step.grads = embed(step.params), embed(step.grads)
    read_only = [buffer for buffer, *_ in guards[-len(PLACEMENTS) :]]
    step.state = {name: embed(tensors) for name, tensors in step.state.items()}
    control = control_rows(device=place.device)
    before = [buffer.clone() for buffer in read_only]
    if step.run(control):
        step.check(control)
    assert all(torch.equal(a, b) for a, b in zip(before, read_only, strict=True))
    for buffer, old, offset, length in guards:
        assert torch.equal(buffer[:offset], old[:offset])
        assert torch.equal(buffer[offset + length :], old[offset + length :])


@each_rule
def test_views_strides_and_mixed_dtypes(place, control_rows, rule):
    """Odd offsets, transposed and strided parameters, 0-dim and empty tensors, and several dtype pairs in one call."""
    base, device = torch.randn(6000), place.device
    shapes = [(1029,), (30, 20), (), (0,), (2048,), (697,), (20, 10), (2, 3, 4, 4)]
    step = Step(rule, place, shapes)
    values = [base.to(device)[1:1030], base.to(device)[2000:2600].view(20, 30).t(), base.to(device)[1990],
              base.to(device)[5:5], base.to(device)[3000:5048].half(), base.to(device)[:700].bfloat16()[3:],
              torch.randn(40, 30, device=device)[::2, 1::3],
              torch.randn(2, 3, 4, 4, device=device).to(memory_format=torch.channels_last)]  # fmt: skip
    if place.backend == "torch":  # longer than a piece, and not contiguous
        values.append(torch.randn(300, 2 * PIECE_CPU // 300).t())
        shapes.append(values[-1].shape)
        step = Step(rule, place, shapes)
    step.params = values
    step.grads[0], step.grads[1] = step.grads[0].half(), step.grads[1].t().contiguous().t()
    for name in RULE_CASES[rule].STATE:
        step.state[name][1] = step.state[name][1].t().contiguous().t()
    count = len(shapes)
    arguments = {
        "rows": [i % 2 for i in range(count)], "ids": [900 - i for i in range(count)],
        "lr_multipliers": torch.linspace(0.3, 1.7, count, device=device),
    }  # fmt: skip
    control = two_rows(control_rows, device)
    if step.run(control, **arguments):
        step.check(control, **arguments)


@each_storage
def test_strided_state_and_scales(place, control_rows, rule, kept):
    """A state whose values or scales are every second cell of a buffer is updated there."""
    step, plain = (Step(rule, place, [700, 64], kept=kept) for _ in range(2))
    spread = {}
    for name, tensors in step.state.items():
        spread[name] = [torch.full((2 * len(t),), 7, dtype=t.dtype, device=t.device) for t in tensors]
        for buffer, t in zip(spread[name], tensors, strict=True):
            buffer[::2] = t
        step.state[name] = [buffer[::2] for buffer in spread[name]]
    control = control_rows(device=place.device)
    if not (step.run(control) and plain.run(control)):
        return
    assert all(torch.equal(a, b) for a, b in zip(step.tensors(), plain.tensors(), strict=True))
    assert all((buffer[1::2] == 7).all() for buffers in spread.values() for buffer in buffers)


@pytest.mark.parametrize("kind", ["stride 0", "stride 2"])
@each_rule
def test_strided_multipliers(place, control_rows, rule, kind):
    step = Step(rule, place, [70, 5, 64])
    several = torch.tensor([0.3, 9.0, 1.0, 9.0, 1.7, 9.0], device=place.device)
    multipliers = torch.tensor([0.4], device=place.device).expand(3) if kind == "stride 0" else several[::2]
    control = control_rows(device=place.device)
    if step.run(control, lr_multipliers=multipliers):
        step.check(control, lr_multipliers=multipliers)


@each_storage
def test_same_bits_twice(place, control_rows, rule, kept):
    results = []
    for _ in range(2):
        step = Step(rule, place, [2500, 77], ("float16", "float16"), kept)
        if not step.run(control_rows(device=place.device)):
            return
        results.append(step.bits())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@settings(max_examples=20, **HYPOTHESIS)
@given(
    sizes=st.lists(st.integers(0, 1300), min_size=1, max_size=4),
    special=st.sampled_from([0.0, -0.0, 1e-45, -1e-39, 65504.0, 1e18, -1e18]),
    rate=st.sampled_from([0.0, 1e-7, 1e-3, 1.0]),
)
@each_rule
def test_any_shapes_and_values(place, control_rows, rule, sizes, special, rate):
    step = Step(rule, place, sizes)
    for t in [*step.params, *step.grads, *[t for tensors in step.state.values() for t in tensors]]:
        t[::3] = special
    for name in RULE_CASES[rule].STATE:
        if name.endswith("_sq"):
            step.state[name] = [t.abs() for t in step.state[name]]
    if step.run(control_rows(device=place.device, LR_OUT=rate)):
        step.check(control_rows(LR_OUT=rate), ordinary=False)
