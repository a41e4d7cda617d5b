"""What the optimizer did, in numbers: rows of the control vector by name, read without holding up the device."""

from typing import Any

import torch
from torch import Tensor

from cruxy_kernels import layout as L

# Slots of the control vector, by the name they have in `metrics()`.
METRICS = {
    "step": L.STEP,
    "lr": L.LR_OUT,
    "lr_scale": L.LR_SCALE,
    "phase": L.PHASE,
    "v_fast": L.V_FAST,
    "v_slow": L.V_SLOW,
    "curvature": L.CURVATURE,
    "beta1": L.BETA1_OUT,
    "beta2": L.BETA2_OUT,
    "clip_threshold": L.CLIP_THRESHOLD,
    "clip_coef": L.CLIP_COEF,
    "grad_norm": L.GRAD_NORM,
    "gamma_norm": L.GAMMA_NORM,
    "max_grad": L.MAX_GRAD,
    "loss": L.LOSS,
    "skipped": L.SKIP,
    "skipped_steps": L.SKIPPED,
    "nonfinite": L.NONFINITE,
    "warning": L.WARNING,
    "warnings": L.WARNINGS,
}
_COUNTS = ("step", "skipped", "skipped_steps", "nonfinite", "warnings")


def named(row: list[float]) -> dict[str, Any]:
    """The slots of METRICS by name; those that count are whole numbers."""
    return {name: int(row[slot]) if name in _COUNTS else row[slot] for name, slot in METRICS.items()}


def calls(row: Tensor) -> int:
    """Calls of step() that a control row has seen. Counted on the device: a CUDA graph replays unseen by the host."""
    return int(row[L.STEP] + row[L.SKIPPED])


class Reader:
    """Copies of the control tensor on the host, without waiting for the device."""

    def __init__(self) -> None:
        self._pending: tuple[Any, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_pending": None}  # an event cannot be copied

    def read(self, control: Tensor, wait: bool) -> list[list[float]]:
        """The newest copy that has arrived; orders the next. `wait`: the values of this moment."""
        if not control.is_cuda:
            return control.tolist()
        old = self._pending
        if old is None or old[0].query():
            copy = torch.empty(control.shape, dtype=control.dtype, pin_memory=True)
            copy.copy_(control, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (event, copy)
        if wait:
            return control.tolist()
        if old is None or not old[0].query():
            old = self._pending
            assert old is not None
            old[0].synchronize()  # nothing has arrived yet: this once, wait
        return old[1].tolist()


class History:
    """The last `size` control rows, on their device: 448 bytes per step. `control_step` writes them."""

    def __init__(self, size: int):
        self._rows = torch.zeros((size, L.NUM_SLOTS))
        self._start = 0

    def begin(self, row: Tensor) -> None:
        """Forget what was: a resumed run has the calls of the run that it continues."""
        self._start = calls(row)

    def log(self, device: torch.device) -> Tensor | None:
        """Where `control_step` writes the row of a step; None where nothing is remembered."""
        if self._rows.device != device:
            self._rows = self._rows.to(device)
        return self._rows if self._rows.shape[0] else None

    def read(self, row: Tensor) -> list[dict[str, Any]]:
        """The remembered steps by name, oldest first; `row`: the present one. Waits for the device."""
        last, rows = calls(row), self._rows.tolist()
        first = max(self._start, last - len(rows))
        return [named(rows[call % len(rows)]) for call in range(first, last)]
