"""Telemetry: norms, baselines, factors and update ratios, against numpy."""

import math

import numpy as np
import pytest
import torch

from cruxy_triton.guard import Policy
from cruxy_triton.guard import telemetry as T


def params_with(norms: list[float], dtype=torch.float32) -> list[torch.Tensor]:
    made = []
    for i, norm in enumerate(norms):
        p = torch.zeros(4 + i, 3, dtype=dtype, requires_grad=True)
        p.grad = torch.zeros_like(p)
        p.grad[i, 1] = norm
        made.append(p)
    return made


def set_norms(params: list[torch.Tensor], norms: list[float]) -> None:
    for i, (p, norm) in enumerate(zip(params, norms, strict=True)):
        assert p.grad is not None
        p.grad[i, 1] = norm


def judge(telemetry: T.Telemetry, loss: float | None = 1.0, sigmas: float = 6.0, **kwargs) -> T.Verdict:
    verdict = telemetry.judge(None if loss is None else torch.tensor(loss), sigmas=sigmas, **kwargs)
    assert verdict is not None
    return verdict


class Oracle:
    """The same baseline in plain Python, one norm at a time, written from the description alone."""

    def __init__(self, memory: int):
        self.mean = self.deviation = 0.0
        self.count, self.memory = 0, memory

    def sigma(self) -> float:
        return max(math.sqrt(math.pi / 2) * self.deviation, 0.2 + 2 / self.count)

    def limit(self, sigmas: float) -> float:
        return math.exp(self.mean + sigmas * self.sigma()) if self.count else math.inf

    def clipped_to(self, norm: float, sigmas: float, far: float) -> float:
        """What is further out than `far` is brought below the limit, the more the further out it is."""
        if norm <= self.limit(far):
            return min(norm, self.limit(sigmas))
        score = (math.log(norm) - self.mean) / self.sigma()
        return self.limit(sigmas * far / score)

    def take(self, norm: float, sigmas: float) -> None:
        if norm > self.limit(sigmas):
            return
        x = math.log(norm)
        if not self.count:
            self.mean, self.count = x, 1
            return
        bound, rate = 3 * self.sigma(), max(1 / (self.count + 1), 1 / self.memory)
        move = min(max(x - self.mean, -bound), bound)
        self.deviation += rate * (abs(move) - self.deviation)
        self.mean += rate * move
        self.count += 1


def test_baselines_and_factors_follow_the_oracle():
    generator = np.random.default_rng(0)
    params = params_with([1.0, 1.0, 1.0])
    telemetry = T.Telemetry(params, Policy(baseline_memory=20))
    oracles = [Oracle(20) for _ in range(4)]
    clipped = 0
    for _ in range(120):
        norms = np.exp(generator.normal([0, 1, -2], [0.3, 0.5, 0.1])).tolist()
        if generator.random() < 0.08:
            norms[generator.integers(3)] *= 300
        set_norms(params, norms)
        verdict = judge(telemetry, sigmas=4.0)
        whole = math.sqrt(sum(x * x for x in norms))
        shrink = [oracle.clipped_to(x, 4.0, 6.0) / x for oracle, x in zip(oracles, [*norms, whole], strict=True)]
        expected = [min(factor, shrink[3]) for factor in shrink[:3]]
        torch.testing.assert_close(verdict.factors, torch.tensor(expected), rtol=2e-4, atol=0)
        assert int(verdict.clipped) == sum(factor < 1 for factor in shrink)
        clipped += min(shrink) < 1
        if not bool(verdict.skip):
            for oracle, x in zip(oracles, [*norms, whole], strict=True):
                oracle.take(x, 4.0)
    assert clipped >= 5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["one gradient", "loss"])
def test_what_is_not_finite_skips_and_moves_no_baseline(bad, where):
    params = params_with([1.0, 2.0])
    telemetry = T.Telemetry(params, Policy())
    for _ in range(10):
        assert not bool(judge(telemetry).skip)
    before = telemetry.state.clone()
    if where == "loss":
        verdict = judge(telemetry, loss=bad)
    else:
        set_norms(params, [1.0, bad])
        verdict = judge(telemetry)
    assert bool(verdict.skip)
    assert torch.equal(telemetry.state[:3], before[:3])


@pytest.mark.parametrize("factor", [20.0, 1e3, 1e6, 1e15])
def test_a_spike_is_clipped_to_its_limit_or_skipped_and_moves_no_baseline(factor):
    params = params_with([1.0, 2.0])
    telemetry = T.Telemetry(params, Policy())
    for _ in range(100):
        judge(telemetry)
    before = telemetry.state.clone()
    set_norms(params, [factor, 2 * factor])
    verdict = judge(telemetry)
    # Constant norms: the deviation is its floor, .2 + 2/100; the limit is 6 of those, a skip 12 (14 times). What is
    # beyond is brought to 6 times 6 over its score.
    sigma = 0.2 + 2 / 100
    score = math.log(factor) / sigma
    assert bool(verdict.skip) == (math.log(factor) > 12 * sigma)
    assert float(verdict.factors[0]) == pytest.approx(math.exp(36 / score * sigma) / factor, rel=1e-3)
    assert torch.equal(telemetry.state[:3], before[:3])


def test_outliers_in_a_row_become_the_new_level():
    params = params_with([1.0])
    telemetry = T.Telemetry(params, Policy(patience=4))
    for _ in range(50):
        judge(telemetry)
    set_norms(params, [1000.0])
    assert [bool(judge(telemetry).skip) for _ in range(8)] == [True] * 4 + [False] * 4
    assert float(telemetry.state[0, 0]) == pytest.approx(math.log(1000), rel=1e-3)


def test_tensors_without_gradient_are_no_observation():
    params = params_with([1.0, 5.0])
    telemetry = T.Telemetry(params, Policy())
    for _ in range(5):
        judge(telemetry)
    count = telemetry.state[2].clone()
    params[1].grad = None
    verdict = judge(telemetry)
    assert telemetry.state[2].tolist() == [count[0] + 1, count[1], count[2] + 1]
    assert not bool(verdict.skip)
    params[0].grad = None
    assert telemetry.judge(None, sigmas=6.0) is None


def test_adagc_ratio_clips_at_a_multiple_of_the_history():
    params = params_with([1.0, 1.0])
    telemetry = T.Telemetry(params, Policy(tensor_ratio=1.05))
    for _ in range(10):
        judge(telemetry)
    set_norms(params, [2.0, 1.04])
    verdict = judge(telemetry)
    assert verdict.factors.tolist() == pytest.approx([1.05 / 2.0, 1.0], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_are_fp32_and_unscaled(dtype):
    params = params_with([256.0, 60000.0], dtype)
    for p in params:
        assert p.grad is not None
        p.grad[:, 2] = 30000.0  # an fp16 sum of squares would overflow
    telemetry = T.Telemetry(params, Policy())
    verdict = judge(telemetry, grad_scale=torch.tensor(4.0))
    expected = [float(p.grad.double().norm()) / 4 for p in params if p.grad is not None]
    assert verdict.report[T.HEAD : T.HEAD + 2].tolist() == pytest.approx(expected, rel=1e-5)
    assert float(verdict.report[T.SCALE]) == 4.0


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_update_ratio_estimates_the_whole(order):
    torch.manual_seed(0)
    params = [torch.randn(60, 50), torch.randn(7, 9), torch.randn(500)]
    if order == "columns":
        params[0] = params[0].t().contiguous().t()
    ratio = T.UpdateRatio(params, samples=1000)
    ratio.begin()
    before = [p.clone() for p in params]
    for p, size in zip(params, (0.01, 0.02, 5.0), strict=True):
        p.add_(size * torch.randn_like(p))
    matrices = list(zip(params[:2], before[:2], strict=True))
    expected = math.sqrt(sum(float((a - b).square().sum()) for a, b in matrices)
                         / sum(float(b.square().sum()) for _, b in matrices))  # fmt: skip
    measured = ratio.end()
    assert measured is not None
    assert float(measured) == pytest.approx(expected, rel=0.1)


def test_update_ratio_notices_replaced_storage():
    p = torch.ones(10, 10)
    ratio = T.UpdateRatio([p])
    ratio.begin()
    ratio.end()
    p.set_(torch.full((10, 10), 2.0))  # pyright: ignore[reportCallIssue, reportArgumentType]
    ratio.begin()
    p.add_(1.0)
    assert float(ratio.end()) == pytest.approx(0.5)  # pyright: ignore[reportArgumentType]
