"""Regimes and loss statistics, against sequences computed by hand."""

import math

import pytest

from cruxy_triton.guard import Policy, Regime
from cruxy_triton.guard.regimes import Regimes
from cruxy_triton.guard.statistics import LossStatistics

W, S, X, U, R = Regime.WARMING, Regime.STABLE, Regime.STRESSED, Regime.UNSTABLE, Regime.RECOVERING


def stable() -> Regimes:
    regimes = Regimes(Policy())
    for _ in range(20):
        regimes.update(0)
    assert regimes.current is S
    return regimes


def test_warming_lasts_its_steps_and_ignores_mild_ones():
    regimes = Regimes(Policy(warmup_steps=4))
    assert [regimes.update(1) for _ in range(5)] == [W, W, W, S, S]
    assert regimes.pressure == 1.0  # the fifth counts: warming is over


def test_warming_ends_stressed_when_a_severe_step_is_fresh():
    regimes = Regimes(Policy(warmup_steps=3))
    assert [regimes.update(s) for s in (0, 0, 2)] == [W, W, X]


def test_one_severe_step_stresses_and_fades_after_twenty():
    regimes = stable()
    assert regimes.update(2) is X
    assert regimes.pressure == 2.0
    # 2 * 0.9^19 = 0.27, 2 * 0.9^20 = 0.243: the twentieth calm step is the first below 0.25.
    assert [regimes.update(0) for _ in range(20)] == [X] * 19 + [S]


def test_mild_steps_stress_only_when_two_follow_each_other():
    regimes = stable()
    assert [regimes.update(s) for s in (1, 0, 0, 0, 0, 0, 0)] == [S] * 7  # 1, .9 ... .53
    assert regimes.update(1) is S  # .53 * .9 + 1 = 1.48
    assert regimes.update(1) is X  # 2.33


def test_three_severe_steps_are_unstable():
    regimes = stable()
    assert [regimes.update(2) for _ in range(3)] == [X, X, U]  # 2, 3.8, 5.42
    assert regimes.pressure == pytest.approx(5.42)
    assert regimes.since == 0


def test_unstable_leaves_by_recovering_with_hysteresis():
    regimes = stable()
    for _ in range(3):
        regimes.update(2)
    # 5.42 * 0.9^n: below 4 (its entry) after 3 steps, but it ends only below 1.5, at n = 13 (1.378).
    assert [regimes.update(0) for _ in range(13)] == [U] * 12 + [R]
    # Below .25 from n = 30 on, the 17th step here; 30 such steps in a row end it.
    assert [regimes.update(0) for _ in range(46)] == [R] * 45 + [S]


def test_recovering_falls_back_to_unstable():
    regimes = stable()
    regimes.recover()
    assert [regimes.update(2) for _ in range(3)] == [R, R, U]


def test_recovering_counts_calm_steps_in_a_row():
    regimes = Regimes(Policy(recover_steps=5))
    regimes.recover()
    assert [regimes.update(s) for s in (0, 0, 0, 0)] == [R] * 4
    assert regimes.update(1) is R  # pressure 1: the count begins again after it has leaked
    seen = [regimes.update(0) for _ in range(18)]  # .9^14 = .229 is the first calm one; four more
    assert seen == [R] * 17 + [S]


def test_state_continues():
    one = stable()
    one.update(2)
    two = Regimes(Policy())
    two.load_state_dict(one.state_dict())
    assert [one.update(s) for s in (2, 2, 0, 0)] == [two.update(s) for s in (2, 2, 0, 0)]


# -- loss ------------------------------------------------------------------------------------------------------


def test_level_of_first_losses_is_their_mean():
    loss = LossStatistics(memory=50, reject=4)
    for value in (4.0, 3.9, 4.1):
        loss.update(value)
    # The winsor bound is far away, so the running rate 1/(n + 1) gives the plain mean: 4, 3.95, 4.0.
    assert loss.level == pytest.approx(4.0)
    # Deviations .1 and .15 from the mean so far, averaged with rates 1/2 and 1/3.
    assert loss.mean_deviation == pytest.approx(0.05 + (0.15 - 0.05) / 3)
    assert loss.deviation == pytest.approx((0.02 + 0.3 / 4) * 4)  # the floor of a young level


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30, 40.0])
def test_an_outlier_never_moves_its_baseline(bad):
    loss = LossStatistics(memory=50, reject=4)
    for i in range(40):
        loss.update(2.0 + 0.01 * (-1) ** i)
    before = loss.state_dict()
    assert loss.update(bad) > 8
    after = loss.state_dict()
    assert {k: v for k, v in after.items() if k != "streak"} == {k: v for k, v in before.items() if k != "streak"}


def test_a_level_that_lasts_is_taken_in():
    loss = LossStatistics(memory=50, reject=4, patience=10)
    for _ in range(30):
        loss.update(2.0)
    scores = [loss.update(4.0) for _ in range(200)]
    assert scores[0] > 8
    assert loss.level == pytest.approx(4.0, rel=0.05)


def test_falling_losses_raise_no_alarm():
    loss = LossStatistics(memory=50, reject=4)
    assert max(loss.update(4.0 * 0.98**i) for i in range(200)) <= 0


def test_phase_tells_restless_from_calm():
    loss = LossStatistics(memory=50, reject=1e9)
    for i in range(300):
        loss.update(2.0 + 0.01 * (-1) ** i)
    assert loss.phase == pytest.approx(0.5, abs=0.03)
    for i in range(10):
        loss.update(2.0 + 0.2 * (-1) ** i)
    assert loss.phase > 0.75


def test_policy_names_what_is_wrong():
    for name, value in [("patience", 0), ("lr_cut", 1.5), ("clip_sigmas", -1.0), ("stressed_at", 9.0),
                        ("tensor_ratio", 0.9), ("update_ratio_target", 0.5), ("max_rollbacks", 1.5),
                        ("act", 1), ("loss_sigmas", float("nan"))]:  # fmt: skip
        with pytest.raises(ValueError, match=name):
            Policy(**{name: value})
