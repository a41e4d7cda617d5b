"""Statistics of the loss, on the host, from the copy that arrives one step late: level, deviation, windows, phase.

    level, deviation   moving averages that an outlier cannot move: a loss more than `reject` deviations above the
                       level is left out (unless it stays there for `patience` steps), the rest is winsorised
    v_fast, v_slow     variance of the loss in a fast (10) and a slow (100 steps) window
    phase              v_fast / (v_fast + v_slow): 1/2 where nothing changes, towards 1 when the loss becomes restless
"""

import math
from typing import Any

# Mean absolute deviation times this is the standard deviation of a normal distribution: sqrt(pi / 2).
NORMAL = math.sqrt(math.pi / 2)


class LossStatistics:
    def __init__(self, memory: int, reject: float, patience: int = 50):
        self.memory, self.reject, self.patience = memory, reject, patience
        self.reset()

    def reset(self) -> None:
        self.count = 0
        self.streak = 0  # losses in a row that were left out
        self.level = self.mean_deviation = 0.0
        self.fast = [0.0, 0.0]  # mean and variance
        self.slow = [0.0, 0.0]

    @property
    def deviation(self) -> float:
        """Robust standard deviation, never below 2 % of the level; wide while few losses are known."""
        floor = (0.02 + 0.3 / (self.count + 1)) * abs(self.level)
        return max(NORMAL * self.mean_deviation, floor, 1e-8)

    @property
    def phase(self) -> float:
        total = self.fast[1] + self.slow[1]
        return self.fast[1] / total if total > 0 else 0.5

    def score(self, loss: float) -> float:
        """How many deviations a loss lies above the level; infinite where it is not finite."""
        if not math.isfinite(loss):
            return math.inf
        return (loss - self.level) / self.deviation if self.count else 0.0

    def update(self, loss: float) -> float:
        """Take a loss in and return its score against what came before it."""
        score = self.score(loss)
        if not math.isfinite(loss):
            return score
        outlier = score > self.reject
        self.streak = self.streak + 1 if outlier else 0
        if outlier and self.streak < self.patience:
            return score
        rate = max(1 / (self.count + 1), 1 / self.memory)
        delta = loss - self.level
        if self.count:
            bound = 3 * self.deviation
            delta = min(max(delta, -bound), bound)
            self.mean_deviation += rate * (abs(delta) - self.mean_deviation)
        self.level += rate * delta
        self.count += 1
        for window, length in ((self.fast, 10), (self.slow, 100)):
            weight = max(1 / self.count, 1 / length)
            difference = loss - window[0]
            window[0] += weight * difference
            window[1] = (1 - weight) * (window[1] + weight * difference * difference)
        return score

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "streak": self.streak, "level": self.level,
                "mean_deviation": self.mean_deviation, "fast": list(self.fast), "slow": list(self.slow)}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.streak = int(state["count"]), int(state["streak"])
        self.level, self.mean_deviation = float(state["level"]), float(state["mean_deviation"])
        self.fast, self.slow = [float(x) for x in state["fast"]], [float(x) for x in state["slow"]]
