"""Clipping of each tensor against its own history, on every backend, against the paper's algorithm in Python floats.

AdaGC, arXiv 2502.11034, algorithm 1, with the counters and zeros of docs/laws.md, section 2.6.
"""

import math

import numpy as np
import pytest
import torch
from cases import RULE_CASES, row_values, wide

from cruxy_kernels import PreparedUpdate, TensorClip, control_step, gradient_telemetry, new_control, update_
from cruxy_kernels import layout as L
from cruxy_kernels.backends import native
from cruxy_kernels.laws import telemetry as telemetry_module

SHAPES = [(7,), (30, 40), (), (5,), (90,), (0,)]
WARMUP = 30


class AdaGC:
    """The paper's recursion for one tensor."""

    def __init__(self) -> None:
        self.gamma, self.t = 0.0, 0

    def __call__(self, norm: float, everything: float) -> float:
        """The factor of a gradient of this norm; `everything` is the norm of all gradients together."""
        if norm == 0:
            return 1.0
        self.t += 1
        if self.t <= WARMUP:
            h = min(1.0 / everything, 1.0)
            self.gamma = h * norm if self.t == 1 else min(self.gamma, h * norm)
        else:
            h = min(1.05 * self.gamma / norm, 1.0)
            self.gamma = 0.98 * self.gamma + 0.02 * h * norm
        return h


def gradients(generator, step, device, scale=1.0):
    """Calm ones with spikes of single tensors, of all, and one of zeros; two dtypes."""
    found = []
    for i, shape in enumerate(SHAPES):
        size = 0.02 * (1 + i) * (1 + 0.5 * math.sin(step / 3 + i))
        size *= 50 if step == 40 + i else 1
        size *= 20 if step in (3, 50) else 1
        size *= 0 if (i == 0 and step < 4) or (i == 1 and step == 37) else 1
        dtype = torch.float16 if i % 2 else torch.float32
        found.append((scale * size * torch.randn(shape, generator=generator)).to(device, dtype))
    return found


def norms(grads, scale=1.0):
    each = [float(np.linalg.norm(wide(g).reshape(-1))) / scale for g in grads]
    return each, math.hypot(*each)


@pytest.mark.parametrize(("law", "scale", "maximize"), [("meta3", None, False), ("stability_v1", 256.0, True)])
def test_histories_and_factors_are_the_papers(place, law, scale, maximize):
    """Tensors that come and go, spikes, zeros, a loss scale, two control rows, skipped steps."""
    control = new_control(2, device=place.device, maximize=maximize)
    history = torch.zeros((9, L.NUM_HISTORY), device=place.device)
    oracles = {i: AdaGC() for i in range(len(SHAPES))}
    row = {i: 8 - i for i in oracles}
    generator = torch.Generator().manual_seed(0)
    grad_scale = None if scale is None else torch.tensor(scale, device=place.device)
    first, last = 0, 60
    if place.backend == "triton":  # the interpreter is slow: from within the warm-up
        first, last = 27, 46
        for i, oracle in oracles.items():
            oracle.gamma, oracle.t = 0.1 * (1 + i), 25
            history[row[i]] = torch.tensor([oracle.gamma, oracle.t])
    for step in range(first, last):
        grads = gradients(generator, step, place.device, scale or 1.0)
        there = [i for i in oracles if step % 5 or i not in (1, 4)]
        bad = {6: "nan", 20: "loss", 33: "found", 34: "inf", 41: "nan"}.get(step)
        given, chosen = {}, [grads[i] for i in there]
        each, everything = norms(chosen, scale or 1.0)
        if bad in ("nan", "inf"):
            chosen[-2].view(-1)[0] = math.nan if bad == "nan" else math.inf
        given["loss"] = torch.tensor(math.nan if bad == "loss" else 1.0, device=place.device)
        given["found_inf"] = torch.tensor(float(bad == "found"), device=place.device)
        before = history.clone()
        clip = TensorClip(history, [row[i] for i in there])
        statistics = gradient_telemetry(chosen, per_tensor=True, backend=place.backend)
        control_step(control, statistics, law=law, grad_scale=grad_scale, clip=clip, backend=place.backend, **given)
        assert control[0, L.SKIP] == float(bad is not None)
        if bad:
            assert torch.equal(history, before)
            continue
        wanted = [oracles[i](norm, everything) for i, norm in zip(there, each, strict=True)]
        assert clip.factors.tolist() == pytest.approx(wanted, rel=1e-5)
        for i, oracle in oracles.items():
            assert history[row[i], 0].item() == pytest.approx(oracle.gamma, rel=1e-5)
            assert history[row[i], 1] == min(oracle.t, WARMUP)
        sign = -1 if maximize else 1
        assert control[:, L.GRAD_FACTOR].tolist() == [sign / (scale or 1.0)] * 2
        assert (control[:, L.CLIP_COEF] == 1).all()
        assert (control[:, L.CLIP_THRESHOLD] == math.inf).all()
    assert min(oracle.t for i, oracle in oracles.items() if SHAPES[i] != (0,)) > WARMUP


@pytest.mark.parametrize("rule", RULE_CASES)
def test_the_factor_comes_before_the_momentum(place, rule):
    """Gradients and factors, or gradients that are multiplied already: the same parameters and state, bit for bit."""
    if place.backend == "native" and rule not in native.RULES_SERVED:
        place = place._replace(backend="torch")
    case = RULE_CASES[rule]
    factors = torch.tensor([0.5, 1.0, 0.25, 2.0, 0.125, 1.0], device=place.device)
    multipliers = torch.tensor([1.5, 0.5, 1.0, 3.0, 0.1, 1.0], device=place.device)
    results = []
    for multiplied in (False, True):
        generator = torch.Generator().manual_seed(3)

        def tensors(generator=generator):
            return [torch.randn(shape, generator=generator).to(place.device) for shape in SHAPES]

        params, grads = tensors(), tensors()
        state = {name: [t.abs() for t in tensors()] for name in case.STATE}
        control = new_control(2, device=place.device, lr=1e-2)
        control_step(control, torch.tensor([1.0, 1.0, 1.0, 0.0], device=place.device), backend=place.backend)
        given = {"grad_factors": factors}
        if multiplied:
            grads, given = [g * f for g, f in zip(grads, factors, strict=True)], {}
        update_(rule, params, grads, state, control, rows=[0, 1] * 3, lr_multipliers=multipliers,
                backend=place.backend, **given)  # fmt: skip
        results.append([*params, *[t for name in case.STATE for t in state[name]]])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_clipped_step_is_the_formula(place):
    """Telemetry, control and update together; Lion's momentum takes the clipped gradient."""
    case, generator = RULE_CASES["lion"], torch.Generator().manual_seed(1)
    params = [torch.randn(s, generator=generator).to(place.device) for s in SHAPES]
    state = {"exp_avg": [0.1 * torch.randn(s, generator=generator).to(place.device) for s in SHAPES]}
    history = torch.zeros((len(SHAPES), L.NUM_HISTORY), device=place.device)
    history[:, 0], history[:, 1] = torch.tensor([0.1, 1.0, 5.0, 0.01, 2.0, 0.5]), WARMUP
    gammas = wide(history[:, 0])
    control = new_control(device=place.device, lr=1e-2)
    grads = [torch.randn(s, generator=generator).to(place.device) for s in SHAPES]
    before = [(wide(p), wide(g), wide(m)) for p, g, m in zip(params, grads, state["exp_avg"], strict=True)]
    clip = TensorClip(history, range(len(SHAPES)))
    control_step(control, gradient_telemetry(grads, per_tensor=True, backend=place.backend), clip=clip,
                 backend=place.backend)  # fmt: skip
    update_("lion", params, grads, state, control, grad_factors=clip.factors, backend=place.backend)
    c = row_values(control, 0)
    for i, (p, g, m) in enumerate(before):
        h = min(1.0, 1.05 * gammas[i] / np.linalg.norm(g.reshape(-1))) if g.size else 1.0
        wanted, decided = case.formula(p, g * c.factor * h, [m], c, 1.0, {})
        for found, name in ((params[i], "param"), (state["exp_avg"][i], "exp_avg")):
            value, terms = wanted[name]
            assert (np.abs(wide(found) - value) <= 3e-6 * terms + 1e-37)[decided if name == "param" else ...].all()
    assert 0 < (clip.factors < 1).sum() < len(SHAPES)


def test_prepared_telemetry_by_tensor(place, monkeypatch):
    """Several partial sums per tensor, in two pairs of dtypes; the histories are those of the plain calls."""
    monkeypatch.setattr(telemetry_module, "MAX_PARTIALS", 3)  # so that a program serves several chunks
    shapes = [(5000,), (3, 43), (), (0,), (9000,), (1024,)]
    generator = torch.Generator().manual_seed(2)
    params = [torch.randn(s, generator=generator).to(place.device) for s in shapes]
    state = {"exp_avg": [torch.zeros_like(p) for p in params]}
    grads = [torch.randn(s, generator=generator).to(place.device) for s in shapes]
    grads[1], grads[4] = grads[1].half(), grads[4].half()
    step = PreparedUpdate("lion", params, grads, state, 1, rows=[0] * 6, ids=range(6), backend=place.backend)
    assert step.usable == (place.backend != "torch")
    if not step.usable:
        return
    rows, spans = step.telemetry(1.5, by_tensor=True), step.spans()
    each = gradient_telemetry(grads, per_tensor=True, backend=place.backend)
    if place.backend == "triton":
        assert spans is not None
        assert spans[:, 1].tolist() == [2, 1, 1, 0, 3, 1]  # runs of ceil(7 / 3) and ceil(10 / 3) chunks: 3+2, 4+4+1
    else:
        assert spans is None
    histories = []
    for telemetry, where in ((rows, spans), (each, None)):
        history = torch.zeros((6, L.NUM_HISTORY), device=place.device)
        clip, control = TensorClip(history, [5, 4, 3, 2, 1, 0], where), new_control(device=place.device)
        for _ in range(2):
            control_step(control, telemetry, clip=clip, backend=place.backend)
        histories.append([history, clip.factors, control[0, : L.OUTPUTS]])
        norm = float(np.linalg.norm(wide(grads[0])))
        assert clip.norms(telemetry)[0].item() == pytest.approx(norm, rel=1e-5)
    for one, other in zip(*histories, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_no_clipping_and_the_laws_own(place):
    telemetry = torch.tensor([1e4, 1e6, 900.0, 0.0], device=place.device)
    for law in L.LAWS:
        found = {}
        for clip in ("global", None):
            control = new_control(device=place.device)
            control_step(control, telemetry, law=law, clip=clip, backend=place.backend)
            found[clip] = control[0, [L.CLIP_COEF, L.CLIP_THRESHOLD, L.GRAD_FACTOR]].tolist()
        assert found[None] == [1.0, math.inf, 1.0]
        assert (found["global"] == found[None]) == (law == "stability_v1")


def test_refusals(place):
    history = torch.zeros((3, L.NUM_HISTORY), device=place.device)
    control, telemetry = new_control(device=place.device), torch.zeros((2, 4), device=place.device)
    for wrong, words in (
        ((history.double(), [0]), "history is torch.float64"),
        ((history[:, :1], [0]), r"of shape \(3, 1\)"),
        ((history.t().contiguous().t(), [0]), "history is not contiguous"),
        ((history, [3]), "ids are not different numbers from 0 to below 3"),
        ((history, [-1]), "ids are not"),
        ((history, [1, 1]), "ids are not"),
        ((history, [0, 1], torch.tensor([[0, 1]])), "spans are not 2 pairs"),
        ((history, [0, 1], torch.tensor([[0, 2], [1, 1]])), "cover every row once"),
        ((history, [0, 1], torch.tensor([[0, 1], [2, 1]])), "cover every row once"),
        ((history, [0, 1], torch.tensor([[0, -1], [0, 1]])), "cover every row once"),
        ((history, [0, 1], torch.tensor([[0.0, 1], [1, 1]])), "spans are not"),
    ):
        with pytest.raises(ValueError, match=words):
            TensorClip(*wrong)
    with pytest.raises(ValueError, match="telemetry has 2 rows; clip expected 1"):
        control_step(control, telemetry, clip=TensorClip(history, [0]), backend=place.backend)
    with pytest.raises(ValueError, match="clip is 'tensors'; expected 'global', None or a TensorClip"):
        control_step(control, telemetry, clip="tensors", backend=place.backend)
    params = [torch.zeros(3, device=place.device)]
    with pytest.raises(ValueError, match=r"grad_factors is torch.float32 of shape \(2,\); expected float32 \(1,\)"):
        update_("lion", params, params, {"exp_avg": params}, control, grad_factors=torch.ones(2), backend=place.backend)
    assert not history.any()
    assert control[0, L.STEP] == 0
