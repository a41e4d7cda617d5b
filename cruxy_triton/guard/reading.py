"""A reading: one step's report, as the host understands it."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cruxy_triton.guard import telemetry as T


@dataclass
class Reading:
    """Numbers of one step. `score` is how many deviations the gradient's norm lies above its history.

    `layers` are the numbers of the tensors that stand out: those that are not finite, else the one that is furthest
    above its history. `quiet` are those whose gradient is exactly 0.
    """

    step: int
    batch: Any
    loss: float | None
    grad_norm: float
    score: float
    loss_scale: float | None
    update_ratio: float | None
    skipped: bool
    overflow: bool
    clipped: int
    layers: list[int]
    worst: float
    norms: Tensor
    seen: dict[str, float] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm) and (self.loss is None or math.isfinite(self.loss))

    @property
    def what(self) -> str:
        """What is not finite."""
        if not math.isfinite(self.grad_norm):
            return "gradient"
        return "loss"

    @property
    def quiet(self) -> list[int]:
        return (self.norms == 0).nonzero().flatten().tolist()


def read(report: Tensor, labels: dict[str, Any]) -> Reading:
    """Take a report apart (`telemetry.Telemetry.judge` puts it together)."""
    head = report[: T.HEAD].tolist()
    n = (len(report) - T.HEAD) // 2 - 1
    norms, scores = report[T.HEAD : T.HEAD + n], report[T.HEAD + n + 1 : T.HEAD + 2 * n + 1]
    loss = head[T.LOSS] if labels["loss"] else None
    worst, layers = 0.0, []
    if not math.isfinite(head[T.NORM]):
        layers = (~torch.isfinite(norms)).nonzero().flatten().tolist()
    elif head[T.SKIP] or head[T.CLIPPED]:
        scores = scores.nan_to_num(neginf=0.0)
        layers = [int(scores.argmax())]
        worst = float(scores[layers[0]])
    optional = {
        "loss": loss,
        "loss_scale": None if math.isnan(head[T.SCALE]) else head[T.SCALE],
        "update_ratio": None if math.isnan(head[T.RATIO]) else head[T.RATIO],
    }
    seen = {"grad_norm": head[T.NORM], "grad_score": head[T.SCORE]}
    seen.update({name: value for name, value in optional.items() if value is not None})
    return Reading(
        step=labels["step"], batch=labels["batch"], grad_norm=head[T.NORM], score=head[T.SCORE],
        skipped=head[T.SKIP] > 0, overflow=head[T.FOUND_INF] > 0, clipped=int(head[T.CLIPPED]), layers=layers,
        worst=worst, norms=norms, seen=seen, **optional,
    )  # fmt: skip
