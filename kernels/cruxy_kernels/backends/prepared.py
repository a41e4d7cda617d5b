"""A rule's update over a fixed set of tensors, checked once: a step then costs its launches and nothing else.

`update_` and `gradient_telemetry` check every tensor in every call. An optimizer's tensors are the same from step to
step: `PreparedUpdate` checks them when it is made and keeps their table; after that only the gradients' addresses
change, and whoever holds it must make it anew when anything else does (addresses of parameters and state, dtypes,
strides, rows). It holds no gradient.
"""

from array import array
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..codec import scale_name
from ..launch import batches, on_device
from ..laws.telemetry import Runs, launch_partials
from ..rules import RULES
from ..tables import COLUMNS, GRAD, build
from ..update import columns_of, launch_batch
from . import native
from .dispatch import check_update, choose_for_update


class PreparedUpdate:
    """`update_(rule, ...)` and `gradient_telemetry` for the same tensors again and again.

    Args: those of `update_`; all parameters on one device. num_rows: rows of the control vector it will be given.

    usable: whether there is a table. There is none for PyTorch operators and for tensors that are not contiguous:
    then the plain calls serve.
    """

    def __init__(
        self,
        rule: str,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Mapping[str, Sequence[Tensor]],
        num_rows: int,
        *,
        rows: Sequence[int],
        ids: Sequence[int],
        backend: str | None = None,
        **flags: bool,
    ) -> None:
        self.rule = RULES[rule]
        self._flags = self.rule.bits(flags)
        tensors = [*params, *grads, *[t for tensors in state.values() for t in tensors]]
        served = choose_for_update(self.rule, params, grads, state, backend)
        self.usable = served != "torch" and all([t.is_contiguous() for t in tensors])
        self._table: Tensor | None = None
        self._kept_runs: list[Runs] | None = None
        if self.usable:  # the plain calls check what they are given
            check_update(self.rule, params, grads, state, num_rows, rows, ids)
        if self.usable and served == "triton":
            columns = columns_of(self.rule, params, grads, state)
            self._batches = list(batches(columns, rows, ids, make_table=build))
            self._codecs = self.rule.codecs_of(state)
        elif self.usable:
            states = [state[name] for name in self.rule.state]
            scales = [state.get(scale_name(name)) for name in self.rule.state]
            codecs = self.rule.codecs_of(state)
            self._table = native.table_of(params, grads, states, scales, rows, ids, codecs)

    def set_grads(self, addresses: Sequence[int]) -> None:
        """Where the gradients lie now (`data_ptr`); their shapes, dtypes, strides and device are the same."""
        column = torch.frombuffer(array("q", addresses), dtype=torch.int64)  # a tenth of torch.tensor's time
        if self._table is not None:
            self._table[:, native.GRAD] = column
            return
        for batch in self._batches:
            whole = len(batch.indices) == len(column)
            batch.table.set_grads(column if whole else column[batch.indices])

    def telemetry(self, gamma: float, *, by_tensor: bool = False) -> Tensor:
        """float32 (n, 4): `gradient_telemetry(grads, partial=True)`; `by_tensor`: the rows are those of `spans`."""
        if self._table is not None:
            rows = native.run_telemetry(self._table, gamma, per_tensor=by_tensor)
            return rows if by_tensor else rows[None]
        runs = self._runs() if by_tensor else [None] * len(self._batches)
        with on_device(self._batches[0].device):
            parts = [
                launch_partials(batch.table, batch.types[GRAD], gamma, run)
                for batch, run in zip(self._batches, runs, strict=True)
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def spans(self) -> Tensor | None:
        """int32 (tensors, 2) on the CPU: the rows of `telemetry(by_tensor=True)` that are each tensor's, as
        `TensorClip` takes them; None: row i is tensor i."""
        if self._table is not None:
            return None
        spans = torch.empty((sum([len(batch.indices) for batch in self._batches]), 2), dtype=torch.int32)
        rows = 0
        for batch, run in zip(self._batches, self._runs(), strict=True):
            spans[batch.indices] = run.spans + torch.tensor([rows, 0], dtype=torch.int32)
            rows += len(run.bounds) - 1
        return spans

    def grad_cells(self) -> list[int] | None:
        """Of each tensor the address on the device of the int64 that `set_grads` keeps at its gradient's address, for
        `LayerTensors`; None where no kernel serves."""
        if self._table is not None:
            return None
        cells = torch.empty(sum([len(batch.indices) for batch in self._batches]), dtype=torch.int64)
        for batch in self._batches:
            entry = torch.arange(len(batch.indices)) * COLUMNS + GRAD
            cells[batch.indices] = batch.table.entries.data_ptr() + entry * batch.table.entries.element_size()
        return cells.tolist()  # it lies on the CPU

    def _runs(self) -> list[Runs]:
        if self._kept_runs is None:
            self._kept_runs = [Runs(batch.table) for batch in self._batches]
        return self._kept_runs

    def update(self, control: Tensor, lr_multipliers: Tensor | None = None, grad_factors: Tensor | None = None) -> None:
        """`update_`; the arguments, contiguous float32, are on the parameters' device."""
        if self._table is not None:
            native.run_update(self.rule, self._table, control, lr_multipliers, grad_factors, self._flags)
            return
        with on_device(self._batches[0].device):
            for batch in self._batches:
                launch_batch(self.rule, batch, self._codecs, control, lr_multipliers, grad_factors, self._flags)
