"""Fault injection: seeded scenarios of `cruxy_triton.bench.faults`; a thousand of them with `pytest -m slow`."""

import pytest

from cruxy_triton.bench import faults
from cruxy_triton.guard import Policy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("scenario", faults.scenarios(34), ids=lambda s: f"{s.fault}-{s.optimizer}-{s.seed}")
def test_scenario(scenario):
    outcome = faults.run(scenario)
    assert outcome.passed, outcome


@pytest.mark.parametrize(("seed", "step", "magnitude"), [(6, 13, 88.1), (3, 13, 20.0), (5, 9, 20.0), (7, 13, 20.0)])
def test_a_spike_while_the_history_is_young(seed, step, magnitude):
    """It is clipped, not skipped, and momentum repeats what is left of it ten times over."""
    outcome = faults.run(faults.Scenario("spike", "SGD", seed, step, magnitude=magnitude))
    assert outcome.passed, outcome


@pytest.mark.parametrize(
    "fault", ["nan in one gradient", "nan loss", "nan parameter", "spike", "nan for ever", "dead layer"]
)
def test_the_faults_are_real(fault, monkeypatch):
    """Without a guard that acts, what is injected ends a run or goes unnoticed: the scenarios can fail."""
    monkeypatch.setattr(faults, "POLICY", Policy(act=False, warmup_steps=1000))
    monkeypatch.setattr(faults.TrainingGuard, "_take_reading", lambda self: None)
    scenario = faults.Scenario(fault, "SGD", seed=3, step=40, magnitude=1e5)
    assert not faults.run(scenario).passed


@pytest.mark.slow
def test_a_thousand_scenarios():
    failed = [outcome for outcome in map(faults.run, faults.scenarios(1000)) if not outcome.passed]
    assert not failed, failed


def test_scenarios_are_reproducible():
    first, second = (faults.run(faults.scenarios(6)[5]) for _ in range(2))
    assert first == second
    assert faults.scenarios(40) == faults.scenarios(40)
    assert {s.fault for s in faults.scenarios(17)} == {*faults.TRANSIENT, *faults.LASTING, *faults.DISK}
