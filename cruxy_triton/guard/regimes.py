"""Regimes: the state of a run, from the severity of each step, with hysteresis.

Each step has a severity: 0 calm, 1 mild (a global gradient norm `clip_sigmas` above its history, a loss `loss_sigmas`
above its level), 2 severe (a skipped step, a loss `loss_sigmas_severe` above its level). They fill a leaky bucket,

    pressure <- pressure_leak * pressure + severity

    warming     the first `warmup_steps` steps: baselines are young, only severe steps count
    stable      pressure stayed low
    stressed    pressure reached `stressed_at`; ends below `calm_at`
    unstable    pressure reached `unstable_at`; ends below `stressed_at`, towards recovering
    recovering  after unstable; ends after `recover_steps` steps below `calm_at`, or at `unstable_at` again

One severe step makes a run stressed, three in a row make it unstable (2, 3.8, 5.42 with a leak of 0.9).
"""

from enum import Enum
from typing import Any

from cruxy_triton.guard.policy import Policy


class Regime(str, Enum):
    WARMING = "warming"
    STABLE = "stable"
    STRESSED = "stressed"
    UNSTABLE = "unstable"
    RECOVERING = "recovering"


class Regimes:
    def __init__(self, policy: Policy):
        self.policy = policy
        self.current = Regime.WARMING
        self.pressure = 0.0
        self.steps = 0  # all steps
        self.since = 0  # steps in the present regime
        self.calm = 0  # steps in a row with low pressure

    def update(self, severity: int) -> Regime:
        """Take one step's severity in; returns the regime that holds after it."""
        policy = self.policy
        self.steps += 1
        self.since += 1
        if self.current is Regime.WARMING and severity < 2:
            severity = 0
        self.pressure = policy.pressure_leak * self.pressure + severity
        self.calm = self.calm + 1 if self.pressure < policy.calm_at else 0
        new = self.current
        if self.pressure >= policy.unstable_at:
            new = Regime.UNSTABLE
        elif self.current is Regime.UNSTABLE:
            if self.pressure < policy.stressed_at:
                new = Regime.RECOVERING
        elif self.current is Regime.RECOVERING:
            if self.calm >= policy.recover_steps:
                new = Regime.STABLE
        elif self.current is Regime.WARMING:
            if self.steps >= policy.warmup_steps:
                new = Regime.STRESSED if self.pressure >= policy.stressed_at else Regime.STABLE
        elif self.pressure >= policy.stressed_at:
            new = Regime.STRESSED
        elif self.pressure < policy.calm_at:
            new = Regime.STABLE
        self._enter(new)
        return new

    def recover(self) -> None:
        """After a rollback: the cause of the pressure is gone."""
        self.pressure = 0.0
        self.calm = 0
        self._enter(Regime.RECOVERING)

    def _enter(self, regime: Regime) -> None:
        if regime is not self.current:
            self.current, self.since = regime, 0

    def state_dict(self) -> dict[str, Any]:
        return {"current": self.current.value, "pressure": self.pressure, "steps": self.steps, "since": self.since,
                "calm": self.calm}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.current = Regime(state["current"])
        self.pressure, self.steps = float(state["pressure"]), int(state["steps"])
        self.since, self.calm = int(state["since"]), int(state["calm"])
