"""The gradient norms that each tensor has had, for `clip="tensor"`: kept in one tensor, so that one launch serves all.

In the optimizer's state they are `state[p]["clip"]`, float32 (layout.NUM_HISTORY,): a view of the row of the tensor,
as `step` is one of the control vector. So they are checkpointed with the rest, and follow a state to another tensor.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cruxy_kernels import TensorClip
from cruxy_kernels import layout as L
from cruxy_triton.batches import Batch, spans_of
from cruxy_triton.rows import ControlRows


class Histories:
    """The histories of an optimizer's tensors, float32 (tensors, layout.NUM_HISTORY), in the order of its groups."""

    def __init__(self) -> None:
        self._values = torch.zeros((0, L.NUM_HISTORY))
        self._known: Any = None
        self._views: dict[Tensor, Tensor] = {}

    def __reduce__(self) -> Any:
        return Histories, ()  # a copy finds them in the states

    def of(self, batches: list[Batch], rows: ControlRows, state: Mapping[Tensor, dict[str, Any]]) -> TensorClip:
        """What `control_step` needs for the tensors of these batches, on the device of the rows."""
        known = rows, rows.changes, rows.values.device
        kept = batches[0].clip  # by batches that serve several steps
        if known == self._known and kept is not None and kept[0] == known:
            return kept[1]
        self._link(known, rows, state)
        ids = [number for batch in batches for number in batch.ids]
        clip = TensorClip(self._values, ids, spans_of(batches))
        batches[0].clip = (known, clip) if all([batch.prepared is not None for batch in batches]) else None
        return clip

    def _link(self, known: Any, rows: ControlRows, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Gather what the states hold: all of it where the tensors are others, else what somebody has put there."""
        if known != self._known:
            self._known, self._views = known, {}
            self._values = torch.zeros((len(rows.number), L.NUM_HISTORY), device=rows.values.device)
        for param, number in rows.number.items():
            held = state.get(param)
            if not held:
                continue
            history = held.get("clip")
            if history is None or history is not self._views.get(param):
                own = self._values[number]
                own.zero_() if history is None else own.copy_(history)
                held["clip"] = self._views[param] = own
