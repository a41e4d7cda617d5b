"""A picture of a guarded run: the loss, the regimes as background, the actions as marks."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cruxy_triton.guard import events as E
from cruxy_triton.guard.events import EventLog
from cruxy_triton.guard.regimes import Regime

COLOURS = {
    Regime.WARMING: "#e8e8e8", Regime.STABLE: "#ffffff", Regime.STRESSED: "#fff3cd", Regime.UNSTABLE: "#f8d7da",
    Regime.RECOVERING: "#d9ecff",
}  # fmt: skip
MARKS = {E.SKIP: "x", E.CLIP: ".", E.LR: "v", E.RESET: "s", E.ROLLBACK: "<", E.STOP: "*"}


def spans(log: EventLog, last: int) -> list[tuple[int, int, Regime]]:
    """(first step, last step, regime) from the beginning to step `last`, in order."""
    found, start, current = [], 1, Regime.WARMING
    for event in log:
        regime = Regime(event.regime)
        if regime is not current:
            if event.step > start:
                found.append((start, event.step - 1, current))
            start, current = event.step, regime
    return [*found, (start, max(last, start), current)]


def background(axes: Any, regimes: Iterable[tuple[int, int, Regime]], *, named: bool = True) -> None:
    """Colour the steps by their regimes, (first step, last step, regime) each; stable ones stay white.

    `named`: for the legend.
    """
    seen = {Regime.STABLE} if named else set(Regime)
    for first, last, regime in regimes:
        label = None if regime in seen else regime.value
        seen.add(regime)
        axes.axvspan(first - 0.5, last + 0.5, color=COLOURS[regime], lw=0, label=label)


def marks(axes: Any, losses: Mapping[int, float], actions: Mapping[str, Sequence[int]]) -> None:
    """Mark the steps of each kind of action on the loss; `losses` by step."""
    for kind, mark in MARKS.items():
        steps = [step for step in actions.get(kind, ()) if step in losses]
        if steps:
            axes.plot(steps, [losses[step] for step in steps], mark, color="tab:red", label=kind, ls="none")


def plot(path: str | os.PathLike[str], losses: Sequence[float], log: EventLog) -> None:
    """Write a PNG (or what the suffix of `path` says); `losses[i]` is the loss of step i + 1. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes: Any = figure.add_subplot()
    background(axes, spans(log, len(losses)))
    axes.plot(range(1, len(losses) + 1), losses, color="black", lw=0.9)
    actions = {kind: [event.step for event in log if event.kind == kind] for kind in MARKS}
    marks(axes, dict(enumerate(losses, 1)), actions)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=120)
