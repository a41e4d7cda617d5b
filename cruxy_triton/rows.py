"""The rows of the control vector: which tensor belongs to which row, their age, and the settings in them.

A group has a main row, which carries its statistics into checkpoints. Tensors that join the group later have an
age of their own (the t of the bias corrections), and with it a row of their own; where the update rule has no
bias correction they share the main row.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cruxy_kernels import RULES, control_inputs, new_control
from cruxy_kernels import layout as L
from cruxy_triton.groups import Group, Settings, rule_of

# Settings that a group has of its own in its rows.
OWN = ("lr", "betas", "eps", "weight_decay", "maximize")


class ControlRows:
    """The control tensor, and the host's view of it.

    values: float32 (num_rows, layout.NUM_SLOTS).
    main: the main row of each group.
    number: a number of its own for each tensor of the groups: its place in them.
    changes: counts every change of which tensor has which row.
    """

    def __init__(self) -> None:
        self.values = torch.zeros((0, L.NUM_SLOTS))
        self.main: list[int] = []
        self.number: dict[Tensor, int] = {}
        self._groups: list[Group] = []
        self._params: list[list[Tensor]] = []  # of each group
        # Of each row: the index of its group, and the call in which its first tensor joined (-1: before this run;
        # None: there is no tensor yet).
        self._group: list[int] = []
        self._born: list[int | None] = []
        self._row: dict[Tensor, int] = {}
        self._written: Any = None
        self._linked = True
        self.changes = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._linked = False  # a copy's views are tensors of their own

    # -- which row ------------------------------------------------------------------

    def follow(self, groups: Sequence[Group]) -> None:
        """Take note of the groups and their tensors as they are now.

        Tensors that are no longer in their group are forgotten, with the rows that serve nobody any more; a new
        group gets a row with the statistics gathered so far.
        """
        params = [group["params"] for group in groups]
        if _same(groups, self._groups) and all(map(_same, params, self._params)):
            return
        self.changes += 1
        old = {id(group): index for index, group in enumerate(self._groups)}
        index_of = {old[id(group)]: new for new, group in enumerate(groups) if id(group) in old}
        home = {p: index for index, group in enumerate(groups) for p in group["params"]}
        self._row = {p: row for p, row in self._row.items() if home.get(p) == index_of.get(self._group[row], -1)}
        used = set(self._row.values())
        kept = [
            row
            for row, index in enumerate(self._group)
            if index in index_of and (row in used or row == self.main[index])
        ]
        first = self.values[:1]  # the statistics of a group that has left serve those that come
        self.values = self.values[kept]
        self._born = [self._born[row] if row in used else None for row in kept]
        self._group = [index_of[self._group[row]] for row in kept]
        moved = {row: new for new, row in enumerate(kept)}
        self._row = {p: moved[row] for p, row in self._row.items()}
        self._groups, self._params = list(groups), [list(tensors) for tensors in params]
        self.number = {p: place for place, p in enumerate(itertools.chain.from_iterable(params))}
        for index, group in enumerate(groups):
            if id(group) not in old:
                row = first[0].clone() if len(first) else new_control()[0]
                row[L.META_BETA2] = group["betas"][1]
                self._add(index, row)
        self.main = [self._group.index(index) for index in range(len(groups))]
        self._written, self._linked = None, False

    def _add(self, group: int, values: Tensor) -> int:
        """Append a row; AGE starts at 0."""
        self.values = torch.cat([self.values, values[None]])
        self.values[-1, L.AGE] = 0
        self._group.append(group)
        self._born.append(None)
        self._written, self._linked = None, False
        return len(self._group) - 1

    def of(self, param: Tensor) -> int | None:
        """The row of a tensor, None before it has joined."""
        return self._row.get(param)

    def join(self, param: Tensor, group: int, call: int, age: float | None = None) -> int:
        """Give a tensor of the group with this index its row.

        call: number of this call of the optimizer's step; new tensors that join in one call share a row.
        age: steps that the tensor's state has seen; None for a new one.
        """
        row: int | None = self.main[group]
        if RULES[rule_of(self._groups[group])].ages:
            if age is None:
                row = self._find(group, lambda row: self._born[row] in (None, call))
            else:
                ages = self.values[:, L.AGE].tolist()  # off the step path: a state was carried over or loaded
                row = self._find(group, lambda row: self._born[row] is None or ages[row] == age)
        if row is None:
            row = self._add(group, self.values[self.main[group]])
        if self._born[row] is None:
            self._born[row] = call if age is None else -1
            self.values[row, L.AGE] = age or 0
        self._row[param] = row
        self._linked = False
        self.changes += 1
        return row

    def _find(self, group: int, fits: Callable[[int], bool]) -> int | None:
        return next((row for row, index in enumerate(self._group) if index == group and fits(row)), None)

    def forget(self, param: Tensor) -> None:
        """Let a tensor join anew."""
        self._row.pop(param, None)
        self.changes += 1

    def restore(self, group: int, values: Tensor | None, ages: dict[Tensor, float]) -> None:
        """Take a group's statistics from a checkpoint; `ages`: of its tensors that have a state."""
        if values is not None:
            self.values[self.main[group]] = values.to(self.values.device)
            self._born[self.main[group]] = -1
        for param, age in ages.items():
            self.join(param, group, -1, age)

    # -- what is in them ------------------------------------------------------------------

    def to(self, device: torch.device) -> None:
        if self.values.device != device:
            self.values = self.values.to(device)
            self._written, self._linked = None, False

    def write(self, settings: Sequence[Settings], **shared: Any) -> None:
        """Copy the groups' settings, and those that all share, into the rows where they changed."""
        if (settings, shared) != self._written:
            own = [{name: getattr(s, name) for name in OWN} for s in settings]
            table = [control_inputs(**own[index], **shared) for index in self._group]
            inputs = torch.tensor(table, pin_memory=self.values.is_cuda)
            self.values[:, : L.NUM_INPUTS].copy_(inputs, non_blocking=True)
            self._written = list(settings), shared
        for row, index in enumerate(self._group):
            lr = self._groups[index]["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                self.values[row, L.LR].copy_(lr.detach().reshape(()), non_blocking=True)

    def link(self, state: dict[Tensor, dict[str, Any]], mode: str) -> None:
        """Renew what refers to the control tensor: `group["control"]` and the `step` of a state are views of it.

        They are there because torch.distributed.checkpoint saves the keys of the live groups and states.
        """
        if self._linked:
            return
        for group, row in zip(self._groups, self.main, strict=True):
            group["mode"], group["control"] = mode, self.values[row]
        for param, row in self._row.items():
            if state.get(param):
                state[param]["step"] = self.values[row, L.AGE]
        self._linked = True


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(a) == len(b) and all(map(operator.is_, a, b))
