"""Snapshots in host memory: the trained parameters, the optimizer's and the guard's state, to roll back to.

What trains is small in the runs that this is for (an adapter, a small model); `bytes_needed` says what a snapshot
would take, and the guard keeps none above the policy's limit. A snapshot counts as good only when the steps after it
were calm: `confirm` is what makes it one. Kept are the start of the run, the two newest good ones and one candidate.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass
class Snapshot:
    step: int
    params: list[Tensor]
    optimizer: dict[str, Any]
    buffers: list[Tensor]
    baselines: Tensor


class Snapshots:
    """
    Args:
        optimizer: the optimizer whose parameters and state are kept.
        model: its buffers (the running statistics of batch norm) are kept too; None: the parameters alone.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module | None = None):
        self.optimizer, self.model = optimizer, model
        self.start: Snapshot | None = None
        self.good: list[Snapshot] = []
        self.candidate: Snapshot | None = None
        self.empty = True  # until the first was tried

    def bytes_needed(self) -> int:
        """Bytes of one snapshot, as far as the optimizer has made its state."""
        tensors = [*self._params(), *self._buffers()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def take(self, step: int, baselines: Tensor) -> None:
        """Copy the present state: the first becomes the start, later ones candidates."""
        snapshot = Snapshot(
            step=step,
            params=[_host_copy(p) for p in self._params()],
            optimizer=_host_copy(self.optimizer.state_dict()),
            buffers=[_host_copy(b) for b in self._buffers()],
            baselines=_host_copy(baselines),
        )
        self._keep(snapshot)

    def mark(self, step: int) -> None:
        """Remember that a snapshot would have been taken here; `restore` cannot use it."""
        self._keep(Snapshot(step, [], {}, [], torch.empty(0)))

    def _keep(self, snapshot: Snapshot) -> None:
        if self.start is None:
            self.start = snapshot
        else:
            self.candidate = snapshot

    def confirm(self) -> None:
        """The steps after the candidate were calm: it is good, and replaces the older of two."""
        if self.candidate is not None:
            self.good = [*self.good[-1:], self.candidate]
            self.candidate = None

    def discard_candidate(self) -> None:
        self.candidate = None

    def newest(self) -> Snapshot | None:
        """The newest good snapshot, else the start of the run."""
        return self.good[-1] if self.good else self.start

    def drop_newest(self) -> None:
        """A rollback to it did not help: the next goes further back. The start is never dropped."""
        if self.good:
            self.good.pop()

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot's parameters and state back; the groups' settings (lr, betas ...) stay as they are now."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to the host are asynchronous; a rollback may wait
        for param, saved in zip(self._params(), snapshot.params, strict=True):
            param.detach().copy_(saved)
        for buffer, saved in zip(self._buffers(), snapshot.buffers, strict=True):
            buffer.copy_(saved)
        kept = [
            {k: v for k, v in group.items() if k in self.optimizer.defaults or k == "initial_lr"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(deepcopy(snapshot.optimizer))
        for group, settings in zip(self.optimizer.param_groups, kept, strict=True):
            group.update(settings)

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _buffers(self) -> list[Tensor]:
        return [] if self.model is None else list(self.model.buffers())


def _host_copy(value: Any) -> Any:
    """A deep copy with its tensors in host memory (pinned and asynchronous from an accelerator)."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.device.type != "cuda" or hasattr(value, "device_mesh"):
            return value.clone() if value.device.type == "cpu" or hasattr(value, "device_mesh") else value.cpu()
        copy = torch.empty_like(value, device="cpu", pin_memory=True)
        return copy.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        return {k: _host_copy(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_host_copy(v) for v in value)
    return deepcopy(value)
