"""The guard: a training run that does not die, above any torch optimizer.

    guard = TrainingGuard(optimizer, model)

attaches through the optimizer's step hooks. docs/guard.md has the regimes, thresholds, actions and budgets.
"""

from typing import TYPE_CHECKING, Any

from cruxy_triton.guard.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from cruxy_triton.guard.events import Event, EventLog, read_events
from cruxy_triton.guard.guard import TrainingGuard, TrainingStopped
from cruxy_triton.guard.policy import Policy
from cruxy_triton.guard.regimes import Regime

if TYPE_CHECKING:
    from cruxy_triton.guard.callback import GuardCallback

__all__ = [
    "CheckpointError",
    "Event",
    "EventLog",
    "GuardCallback",
    "Policy",
    "Regime",
    "TrainingGuard",
    "TrainingStopped",
    "load_checkpoint",
    "read_events",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name == "GuardCallback":  # transformers is an optional dependency
        from cruxy_triton.guard.callback import GuardCallback

        return GuardCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
