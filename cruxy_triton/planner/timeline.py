"""Memory over one training step: what is alive at each moment, from loading to the optimizer's step.

The order is that of the allocations; it is no clock. Shown are loading and the second step, which has its optimizer
state already.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise

from cruxy_triton.planner.footprint import recorded
from cruxy_triton.planner.step import Step

REGIONS = ("load", "forward", "loss", "backward", "optimizer")
COLUMNS = 240
_LEAST = 12  # columns of a region, however little happens in it


@dataclass(frozen=True)
class Moment:
    """The highest of some moments that follow each other: its phase, and the bytes alive by component."""

    phase: str
    parts: dict[str, int]

    @property
    def region(self) -> str:
        return region(self.phase)

    @property
    def allocated(self) -> int:
        return sum(self.parts.values())


def region(phase: str) -> str:
    """The part of a step that a phase of the ledger belongs to."""
    return "load" if phase == "loaded" else phase.partition(":")[0]


def timeline(step: Step, columns: int = COLUMNS) -> list[Moment]:
    """About `columns` moments of `step`, the highest of each stretch. The highest of all is the highest of the plan's
    `phases`."""
    changes = [change for change in recorded(step).changes if change[0] != "end"]
    phases = [change[0] for change in changes]
    first = phases.index("forward")
    second = max(i for i in range(first + 1, len(phases)) if phases[i] == "forward" != phases[i - 1])
    left: dict[str, int] = {}  # by the first step
    for _, component, nbytes in changes[first:second]:
        left[component] = left.get(component, 0) + nbytes
    shown = changes[:first] + [("forward", name, nbytes) for name, nbytes in left.items()] + changes[second:]
    live: dict[str, int] = {}
    moments = []
    for _, group in groupby(shown, key=lambda change: region(change[0])):
        part = list(group)
        count = min(len(part), max(_LEAST, columns * len(part) // len(shown)))
        ends = [len(part) * n // count for n in range(count + 1)]
        moments += [_highest(part[begin:end], live) for begin, end in pairwise(ends)]
    return moments


def _highest(changes: list[tuple[str, str, int]], live: dict[str, int]) -> Moment:
    """Books `changes` into `live` and returns the moment at which most was alive, before or after one of them."""
    total = most = sum(live.values())
    phase, parts = changes[0][0], dict(live)
    for now, component, nbytes in changes:
        live[component] = live.get(component, 0) + nbytes
        total += nbytes
        if total > most:
            most, phase, parts = total, now, dict(live)
    return Moment(phase, {name: size for name, size in parts.items() if size})
