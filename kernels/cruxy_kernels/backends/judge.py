"""The judgement of gradients step after step (laws/judge.py), for tensors that stay the same from step to step.

Tables are made when dtypes, lengths or the set of gradients change; otherwise only addresses are written anew.
"""

import os
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..launch import batches
from ..laws.judge import Limits, Sums, launch_judge, specification
from ..tables import GRAD, build, to_device
from . import native
from .dispatch import VARIABLE, choose


class GradientJudge:
    """`judge` compares the gradients of n tensors with their history and says what to do with the step.

    Args:
        state: float32 (4, n + 1), contiguous, zeros at first, changed in place: mean and mean absolute deviation of the
            logarithm of each norm and of the norm of all, values taken in, outliers in a row.
        limits: the thresholds.
        compiles: whether the loops of a CPU may be compiled for large gradients. Otherwise they serve where they are
            there already.

    What `judge` returns is float32 on the state's device; `layout` names its parts (JUDGE_). It is computed in one
    launch per dtype of the gradients, and the host waits for nothing.

    Raises ValueError for a state that does not fit.
    """

    def __init__(self, state: Tensor, limits: Limits, *, compiles: bool = False) -> None:
        if state.dtype != torch.float32 or state.dim() != 2 or state.shape[0] != 4 or not state.is_contiguous():
            raise ValueError(
                f"state is {state.dtype} of shape {tuple(state.shape)}; expected contiguous float32 (4, n + 1)"
            )
        self.state, self.limits, self._compiles = state, limits, compiles
        self._key: object = None
        self._served = ""
        self._table: Tensor | None = None

    @torch.no_grad()
    def judge(
        self,
        grads: Sequence[Tensor | None],
        *,
        sigmas: float,
        loss: Tensor | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor:
        """The judgement of these gradients; None for a tensor that has none: its norm is 0, and it learns nothing.

        Args:
            grads: dense, on the state's device; one at least.
            sigmas: clip above this many deviations.
            loss, grad_scale, found_inf: 0-dim float32 on the state's device. The gradients are still multiplied by
                `grad_scale`; `found_inf` above 0: the step is skipped already.
        """
        ids = [i for i, g in enumerate(grads) if g is not None]
        here = [_flat(g) for g in grads if g is not None]
        key = (ids, [g.dtype for g in here], [g.numel() for g in here])
        if key != self._key:
            self._prepare(here, ids)
            self._key = key
        numbers = (loss, grad_scale, found_inf, sigmas, self.limits)
        if self._served == "torch":
            return specification(self._norms(here, ids, grad_scale), self.state, *numbers)
        column = torch.frombuffer(array("q", [g.data_ptr() for g in here]), dtype=torch.int64)
        if self._table is not None:
            self._table[:, native.GRAD] = column
            return native.judge(self._table, None, self.state, *numbers)
        for batch in self._batches:
            batch.table.set_grads(column if len(batch.indices) == len(column) else column[batch.indices])
        return launch_judge(self._batches, self._sums, self.state, *numbers)

    @torch.no_grad()
    def judge_norms(
        self, norms: Tensor, *, sigmas: float, loss: Tensor | None = None, grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The judgement of norms (n,), float32, that somebody else took: unscaled; the rest as for `judge`."""
        numbers = (loss, grad_scale, found_inf, sigmas, self.limits)
        served = self._choose([self.state])
        if served == "triton":
            return launch_judge(None, norms.contiguous(), self.state, *numbers)
        if served == "native":
            return native.judge(None, norms.contiguous(), self.state, *numbers)
        return specification(norms, self.state, *numbers)

    def _choose(self, grads: Sequence[Tensor]) -> str:
        chosen_by_user = os.environ.get(VARIABLE)
        if self.state.is_cpu and not (chosen_by_user or self._compiles or native.built()):
            return "torch"
        return choose(grads)

    def _prepare(self, grads: list[Tensor], ids: list[int]) -> None:
        self._served, self._table = self._choose(grads), None
        if self._served == "native":
            self._table = native.table_of(None, grads)
            self._table[:, native.INDEX] = torch.tensor(ids)
        elif self._served == "triton":
            # A launch without elements would never judge.
            self._batches = [b for b in batches({GRAD: grads}, read_only=(GRAD,), make_table=build) if b.table.chunks]
            if self._batches:
                self._sums = Sums(self._batches, ids, self.state.shape[1] - 1, self.state.device)
            else:
                self._served = "torch"

    def _norms(self, grads: list[Tensor], ids: list[int], grad_scale: Tensor | None) -> Tensor:
        norms = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32))  # pyright: ignore[reportPrivateImportUsage]
        if grad_scale is not None:
            norms = norms / grad_scale
        if len(ids) < self.state.shape[1] - 1:
            whole = torch.zeros(self.state.shape[1] - 1, device=norms.device)
            norms = whole.index_copy_(0, to_device(torch.tensor(ids), norms.device), norms)
        return norms


def _flat(grad: Tensor) -> Tensor:
    """Elements that lie one behind the other, in whatever order."""
    if grad.is_contiguous() or grad.is_contiguous(memory_format=torch.channels_last):
        return grad
    return grad.contiguous()
