"""The tensors of a step, sorted once into the parallel lists that the kernels take, and kept while they are the same.

From one step to the next an optimizer's tensors seldom change: mostly it is the gradients that lie somewhere else.
`StepPlan.serves` finds that out with a few passes over lists of addresses, which for 300 tensors takes a tenth of the
time that sorting and checking them takes; the launches then go out from tables that are there already.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import cruxy_kernels as kernels
from cruxy_kernels import layout as L
from cruxy_triton import distributed, groups

_dtype, _nbytes = operator.attrgetter("dtype"), operator.attrgetter("nbytes")
_address, _contiguous = Tensor.data_ptr, Tensor.is_contiguous
_turned = Tensor.is_neg  # a view whose memory holds the other sign


@dataclass
class Batch:
    """The tensors of one kind of update: parameters, gradients and state as this rank holds them."""

    rule: str
    flags: tuple[bool, ...]
    use_gc: bool
    dtype: torch.dtype
    device: torch.device
    mesh: Any  # over which their statistics are combined
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    state: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    prepared: kernels.PreparedUpdate | None = None
    clip: tuple[Any, kernels.TensorClip] | None = None  # of the first of some batches: see clipping.py

    def add(self, param: Tensor, grad: Tensor, state: dict[str, Any], row: int, number: int) -> None:
        self.params.append(param)
        self.grads.append(grad)
        for name, tensor in state.items():
            if name not in groups.NO_MOMENTS:
                self.state.setdefault(name, []).append(tensor)
        self.rows.append(row)
        self.ids.append(number)

    def prepare(self, num_rows: int, backend: str | None) -> bool:
        """Check the tensors once for the steps to come; whether these need only the gradients' addresses."""
        if self.use_gc or self.mesh is not None:
            return False
        prepared = kernels.PreparedUpdate(
            self.rule, self.params, self.grads, self.state, num_rows, rows=self.rows, ids=self.ids, backend=backend,
            **groups.named_flags(self.rule, self.flags),
        )  # fmt: skip
        self.prepared = prepared if prepared.usable else None
        return prepared.usable

    def telemetry(self, gamma: float, found_inf: Tensor | None, backend: str | None, by_tensor: bool = False) -> Tensor:
        """The statistics of the gradients on all ranks, (n, 4): their sum is the total. by_tensor: see `spans`."""
        if self.prepared is not None:
            return self.prepared.telemetry(gamma, by_tensor=by_tensor)
        part = kernels.gradient_telemetry(
            self.grads, gamma=gamma, per_tensor=by_tensor, partial=self.mesh is None, backend=backend
        )
        if self.mesh is None:
            return part
        if found_inf is not None:  # a rank's GradScaler knows only its own shards
            first = part.view(-1, L.NUM_TELEMETRY)[0]
            first[L.COUNT_NONFINITE] += found_inf.to(part.device, non_blocking=True).reshape(())
        return distributed.over_mesh(part, self.mesh)

    def spans(self) -> Tensor:
        """int32 (tensors, 2) on the CPU: of each tensor the first row of `telemetry(by_tensor=True)`, and how many."""
        spans = None if self.prepared is None else self.prepared.spans()
        count = len(self.params)
        return torch.stack((torch.arange(count), torch.ones(count)), 1).int() if spans is None else spans

    def update(
        self,
        control: Tensor,
        backend: str | None,
        grad_factors: Tensor | None = None,
        lr_multipliers: Tensor | None = None,
    ) -> None:
        """The update; `grad_factors`, `lr_multipliers`: float32 (tensors,), on any device."""
        if control.device != self.device:
            control = control.to(self.device, non_blocking=True)
        if grad_factors is not None:
            grad_factors = grad_factors.to(self.device, non_blocking=True)
        if lr_multipliers is not None:
            lr_multipliers = lr_multipliers.to(self.device, non_blocking=True)
        if self.prepared is not None:
            self.prepared.update(control, lr_multipliers, grad_factors)
            return
        grads = [_centralized(g) if g.dim() > 1 and g.numel() else g for g in self.grads] if self.use_gc else self.grads
        kernels.update_(
            self.rule, self.params, grads, self.state, control, rows=self.rows, ids=self.ids,
            lr_multipliers=lr_multipliers, grad_factors=grad_factors, backend=backend,
            **groups.named_flags(self.rule, self.flags),
        )  # fmt: skip


def spans_of(batches: list[Batch]) -> Tensor | None:
    """`Batch.spans` in the telemetry of all of them, one after the other; None: row i is tensor i."""
    if all([batch.prepared is None for batch in batches]):
        return None
    spans, first = [], 0
    for batch in batches:
        own = batch.spans()
        spans.append(own + torch.tensor([first, 0]))
        first += int(own[:, 1].sum())
    return torch.cat(spans)


class StepPlan:
    """The batches of a step, for as long as nothing but the gradients' addresses changes.

    key: whatever else decides the batches (settings, rows); with another key they serve no more. Holds no gradient
    between the steps.
    """

    def __init__(
        self, batches: list[Batch], absent: list[Tensor], state: Mapping[Tensor, dict[str, Any]], key: Any
    ) -> None:
        self.batches, self._absent, self._key = batches, absent, key
        self._params = [p for batch in batches for p in batch.params]
        grads = [g for batch in batches for g in batch.grads]
        self._param_addresses, self._grad_addresses = list(map(_address, self._params)), list(map(_address, grads))
        self._layouts = _Layouts(self._params + grads)
        self._state = _StateAddresses(batches, state)

    @classmethod
    def prepared(
        cls,
        batches: list[Batch],
        absent: list[Tensor],
        state: Mapping[Tensor, dict[str, Any]],
        key: Any,
        num_rows: int,
        backend: str | None,
    ) -> "StepPlan | None":
        """The plan of these batches, None where some of them have to be handed their gradients in each step."""
        if not all([batch.prepare(num_rows, backend) for batch in batches]):
            return None
        plan = cls(batches, absent, state, key)
        for batch in batches:
            batch.grads = []
        return plan

    def serves(self, state: Mapping[Tensor, dict[str, Any]] | None, key: Any) -> bool:
        """Whether the present step is one of these batches; they have its gradients then.

        state: None where nobody but the optimizer can have reached its tensors.
        """
        if key != self._key or (self._absent and any([p.grad is not None for p in self._absent])):
            return False
        grads: list[Any] = [p.grad for p in self._params]  # one that is missing is noticed below
        tensors: list[Any] = self._params + grads
        try:
            addresses = list(map(_address, grads))
            same = (
                list(map(_address, self._params)) == self._param_addresses
                and self._layouts.same(tensors)
                and (state is None or self._state.same(state))
            )
        except (TypeError, KeyError, AttributeError, RuntimeError):  # a gradient missing or sparse, a state gone
            return False
        if not same:
            return False
        moved = addresses != self._grad_addresses
        if moved:
            self._grad_addresses = addresses
            start = 0
            for batch in self.batches:
                assert batch.prepared is not None
                batch.prepared.set_grads(addresses[start : start + len(batch.params)])
                start += len(batch.params)
        return True


class _Layouts:
    """What is behind the addresses of some contiguous tensors: a vocabulary that is cut down in place, or a view that
    is transposed in place, has the address that it had.

    For hundreds of tensors the guards of torch.compile tell in one call that nothing has changed, in less than half
    the time. They are no public interface: where they are not there, or see a difference, the attributes decide.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._sizes, self._dtypes = list(map(_nbytes, tensors)), list(map(_dtype, tensors))
        self._guards: Any = None

    def same(self, tensors: list[Any]) -> bool:
        if self._guards and self._guards.check(*tensors):
            return True
        same = (
            list(map(_nbytes, tensors)) == self._sizes
            and list(map(_dtype, tensors)) == self._dtypes
            and all(map(_contiguous, tensors))
            and not any(map(_turned, tensors))
        )
        if same and self._guards is None:  # here and not above: many plans serve once
            self._guards = _guards_of(tensors)
        return same


def _guards_of(tensors: list[Tensor]) -> Any:
    """torch.compile's guards of these tensors' sizes, strides and dtypes, which hold no tensor; False without any."""
    try:
        make = torch._C._dynamo.guards.TensorGuards  # pyright: ignore[reportAttributeAccessIssue]
        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        guards = make(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        return guards if guards.check(*tensors) else False
    except Exception:  # of another torch, with whatever it raises
        return False


class _StateAddresses:
    """Where the state of some batches lies: whoever moves a state away and back replaces tensors, or their data."""

    def __init__(self, batches: list[Batch], state: Mapping[Tensor, dict[str, Any]]) -> None:
        self._all = list(state.values())
        self._lengths = list(map(len, self._all))
        self._read = [(name, [state[p] for p in batch.params]) for batch in batches for name in batch.state]
        tensors = self._tensors()
        self._addresses, self._layouts = list(map(_address, tensors)), _Layouts(tensors)

    def _tensors(self) -> list[Any]:
        # `step` is left out: no kernel reads it.
        return [state[name] for name, states in self._read for state in states]

    def same(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether they lie there still; raises what reading an odd state raises."""
        states = list(state.values())
        same = len(states) == len(self._all) and all(map(operator.is_, states, self._all))
        if not same or list(map(len, states)) != self._lengths:
            return False
        tensors = self._tensors()
        return list(map(_address, tensors)) == self._addresses and self._layouts.same(tensors)


def _centralized(grad: Tensor) -> Tensor:
    """Gradient centralization (arXiv 2004.01461): no mean over all dimensions but the first."""
    grad = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
    return grad - grad.mean(dim=tuple(range(1, grad.dim())), keepdim=True)
