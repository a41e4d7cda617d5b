"""Judgement of gradients on every backend, against its description in plain Python and float64."""

import math

import pytest
import torch

from cruxy_kernels import GradientJudge, Limits
from cruxy_kernels import layout as L
from cruxy_kernels.laws.judge import size

SHAPES = [(5,), (40, 41), (0,), (), (2049,), *[(3,)] * 130]  # more tensors than are judged at once
LIMITS = Limits(skip=12.0, far=6.0, memory=20, patience=3)
# Norms are sums of fp32 squares, their logarithms are good to a few roundings; a score divides them by .2 at least.
CLOSE = {"rel": 2e-5, "abs": 2e-5}


@pytest.fixture(autouse=True)
def backend(place, monkeypatch):
    monkeypatch.setenv("CRUXY_BACKEND", place.backend)


class Oracle:
    """One norm after the other, from the formulas of laws/judge.py alone."""

    def __init__(self, tensors, limits):
        self.state = [[0.0, 0.0, 0, 0] for _ in range(tensors + 1)]  # mean, deviation, values, outliers in a row
        self.limits = limits

    def judge(self, norms, loss, found_inf, sigmas):
        """(skip, scores, factors)."""
        limits, norms = self.limits, [*norms, math.hypot(*norms)]
        seen = []
        for (mean, deviation, count, _), norm in zip(self.state, norms, strict=True):
            finite = 0 < norm < math.inf
            x = math.log(norm) if finite else 0.0
            sigma = max(math.sqrt(math.pi / 2) * deviation, 0.2 + 2 / count) if count else 2e6
            score = (x - mean) / sigma if finite else 0.0
            reach = sigmas * limits.far / score if score > limits.far else sigmas
            above = max(0.0, x - mean - reach * sigma) if finite else 0.0
            if limits.ratio is not None and count and finite and len(seen) < len(norms) - 1:
                above = max(above, x - mean - math.log(limits.ratio))
            seen.append((finite, x, sigma, score, above))
        good = math.isfinite(norms[-1] + loss) and seen[-1][3] <= limits.skip and not found_inf
        for entry, (finite, x, sigma, score, _) in zip(self.state, seen, strict=True):
            mean, deviation, count, streak = entry
            outlier = score > sigmas
            if finite and (count == 0 or (outlier and streak >= limits.patience - 1)):
                mean, deviation, count = x, 0.0, 1
            elif finite and not outlier and good:
                rate, move = max(1 / (count + 1), 1 / limits.memory), min(max(score, -3), 3) * sigma
                mean, deviation, count = mean + rate * move, deviation + rate * (abs(move) - deviation), count + 1
            entry[:] = mean, deviation, count, streak + 1 if outlier else 0
        factors = [math.exp(-above) for *_, above in seen]
        if limits.clip != "tensors":
            factors[:-1] = [1.0] * (len(factors) - 1)
        if limits.clip is None:
            factors[-1] = 1.0
        return not good, [s for *_, s, _ in seen], factors


def gradients(place, step, dtype):
    """Gradients whose scale wanders, with spikes of one and of all, zeros, and what is not finite."""
    generator = torch.Generator().manual_seed(step)
    scale = 1.5 if step % 2 else 1.0
    grads = [scale * torch.randn(shape, generator=generator) for shape in SHAPES]
    if step in (7, 15, 16, 17, 18):
        grads[1] *= 200
    if step in (9, 20):
        grads = [g * (40 if step == 9 else 6e3) for g in grads]
    if step == 11:
        grads[4][2048] = math.nan
    if step == 12:
        grads[0][0] = -math.inf
    if step == 13:
        grads[1].zero_()
    grads = [g.to(place.device, dtype) for g in grads]
    return [None if step % 5 == 4 and i == 3 else g for i, g in enumerate(grads)]


def number(value, place):
    return None if value is None else torch.tensor(value, device=place.device)


@pytest.mark.parametrize(
    ("clip", "ratio", "dtype", "tensors"),
    [
        ("tensors", None, torch.float32, len(SHAPES)),
        ("tensors", 1.5, torch.bfloat16, 6),
        ("global", None, torch.float16, 6),
        (None, None, torch.float32, 6),
    ],
)
def test_it_follows_the_description(place, clip, ratio, dtype, tensors):
    limits = Limits(**{**vars(LIMITS), "clip": clip, "ratio": ratio})
    state = torch.zeros((4, tensors + 1), device=place.device)
    judge, oracle = GradientJudge(state, limits), Oracle(tensors, limits)
    skipped = clipped = 0
    for step in range(22):
        grads = gradients(place, step, dtype)[:tensors]
        scale = 4.0 if step % 3 == 0 else None
        loss = None if step % 4 == 0 else math.nan if step == 6 else 2.0
        found = float(step == 10) if step >= 8 else None
        sigmas = 3.0 if step % 2 else 6.0
        out = judge.judge(
            grads, sigmas=sigmas, loss=number(loss, place), grad_scale=number(scale, place),
            found_inf=number(found, place),
        ).cpu()  # fmt: skip
        norms = [0.0 if g is None else float(g.double().norm()) / (scale or 1.0) for g in grads]
        skip, scores, factors = oracle.judge(norms, loss or 0.0, found, sigmas)
        n, report = tensors + 1, out[L.JUDGE_REPORT :]
        head, numbers = report[: L.JUDGE_HEAD].tolist(), report[L.JUDGE_HEAD :]
        assert (bool(out[L.JUDGE_FOUND]), bool(head[L.JUDGE_SKIP])) == (skip, skip), step
        assert numbers[: n - 1].tolist() == pytest.approx(norms, rel=2e-5, nan_ok=True)
        if math.isfinite(norms[1] + norms[4] + norms[0]):
            assert head[L.JUDGE_NORM] == pytest.approx(math.hypot(*norms), rel=2e-5)
            assert numbers[n : 2 * n].tolist() == pytest.approx(scores, **CLOSE)
            assert head[L.JUDGE_SCORE] == float(numbers[2 * n - 1])
        assert numbers[2 * n :].exp().tolist() == pytest.approx(factors, **CLOSE)
        assert head[L.JUDGE_CLIPPED] == sum(factor < 1 for factor in factors)
        assert float(out[L.JUDGE_APPLY]) == pytest.approx((scale or 1.0) / factors[-1], **CLOSE)
        for place_of, told in ((L.JUDGE_LOSS, loss), (L.JUDGE_SCALE, scale)):
            assert head[place_of] == pytest.approx(math.nan if told is None else told, nan_ok=True)
        assert head[L.JUDGE_FOUND_INF] == (found or 0.0)
        mean, deviation, count, streak = state.cpu().tolist()
        assert count == [entry[2] for entry in oracle.state], step
        assert streak == [entry[3] for entry in oracle.state], step
        assert mean == pytest.approx([entry[0] for entry in oracle.state], **CLOSE)
        assert deviation == pytest.approx([entry[1] for entry in oracle.state], **CLOSE)
        skipped, clipped = skipped + skip, clipped + (min(factors) < 1)
    assert skipped >= 4
    assert clipped >= (4 if clip == "tensors" else 1 if clip else 0)


def test_given_norms_are_judged_like_measured_ones(place):
    states = [torch.zeros((4, 4), device=place.device) for _ in range(2)]
    measuring, given = (GradientJudge(state, LIMITS) for state in states)
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        grads = [(50 if step == 6 else 1) * torch.randn(n, generator=generator).to(place.device) for n in (7, 300, 2)]
        norms = torch.stack([g.norm() for g in grads])
        kinds = {"sigmas": 3.0, "loss": number(1.0, place)}
        torch.testing.assert_close(
            measuring.judge(grads, **kinds), given.judge_norms(norms, **kinds), rtol=1e-5, atol=1e-5, equal_nan=True
        )
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)


def test_no_clipping_hands_on_the_scale_as_it_is(place):
    judge = GradientJudge(torch.zeros((4, 2), device=place.device), LIMITS)
    for scale, expected in ((None, 1.0), (65536.0, 65536.0), (3.0, 3.0)):
        out = judge.judge([torch.ones(5, device=place.device)], sigmas=6.0, grad_scale=number(scale, place))
        assert out[[L.JUDGE_FOUND, L.JUDGE_APPLY]].tolist() == [0.0, expected]
        assert len(out) == size(1)


def test_one_launch_per_dtype_whatever_the_number_and_order(place, started):
    """Gradients that move, change their memory order, come and go are followed; all of one dtype are one launch."""
    state = torch.zeros((4, 41), device=place.device)
    judge = GradientJudge(state, LIMITS)
    for step in range(4):
        grads: list = [torch.full((6, 7), 0.1 * (i + 1), device=place.device) for i in range(40)]
        if step == 1:
            grads[3] = grads[3].t().contiguous().t()
        if step == 2:
            grads[5] = None
        if step == 3:
            grads[7] = grads[7].half()
        started.clear()
        out = judge.judge(grads, sigmas=6.0)
        wanted = [0.0 if g is None else float(g.double().norm()) for g in grads]
        assert out[L.JUDGE_REPORT + L.JUDGE_HEAD :][:40].tolist() == pytest.approx(wanted, rel=1e-5)
        if place.backend == "triton":
            assert started == ["judge_kernel"] * (2 if step == 3 else 1)
        started.clear()
        judge.judge_norms(out[L.JUDGE_REPORT + L.JUDGE_HEAD :][:40].clone(), sigmas=6.0)
        assert started == (["judge_kernel"] if place.backend == "triton" else [])


def test_nothing_but_empty_gradients(place):
    state = torch.zeros((4, 2), device=place.device)
    out = GradientJudge(state, LIMITS).judge([torch.zeros(0, device=place.device)], sigmas=6.0)
    assert out[L.JUDGE_FOUND] == 0
    assert not state.any()


def test_a_state_that_does_not_fit_is_refused(place):
    for state in (torch.zeros(4, 3, dtype=torch.float64), torch.zeros(3, 4), torch.zeros(3, 4).t()):
        with pytest.raises(ValueError, match=r"expected contiguous float32 \(4, n \+ 1\)"):
            GradientJudge(state.to(place.device), LIMITS)
