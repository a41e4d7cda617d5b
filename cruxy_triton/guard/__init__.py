"""The guard: a training run that does not die, above any torch optimizer.

    guard = TrainingGuard(optimizer, model)

attaches through the optimizer's step hooks. docs/guard.md has the regimes, thresholds, actions and budgets.
"""

from cruxy_triton.guard.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from cruxy_triton.guard.events import Event, EventLog, read_events
from cruxy_triton.guard.guard import TrainingGuard, TrainingStopped
from cruxy_triton.guard.policy import Policy
from cruxy_triton.guard.regimes import Regime

__all__ = [
    "CheckpointError",
    "Event",
    "EventLog",
    "Policy",
    "Regime",
    "TrainingGuard",
    "TrainingStopped",
    "load_checkpoint",
    "read_events",
    "save_checkpoint",
]
