"""The memory of one training step, by phase and component.

Every phase's peak is linear in the number of layers, so that runs of few layers give the model's own. The peak is the
maximum over phases, never a sum. For the families that the planner knows the run is a walk: milliseconds, no torch.

At the loss and with the stock loss this comes to W + 12 n_lora + act + (4h + 4) T + 12 V T bytes, with the weights'
bytes W, T = batch * seq tokens and, under checkpointing, act = 2 h T per layer (10 V T where the output object is not
kept).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cruxy_triton.errors import UserError
from cruxy_triton.planner.ledger import Ledger
from cruxy_triton.planner.step import Step
from cruxy_triton.planner.walk import walk


@dataclass
class Footprint:
    """Bytes by phase, and by component at the highest phase."""

    phases: dict[str, int]
    components: dict[str, int]
    peak_phase: str
    parts: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def peak_allocated(self) -> int:
        return self.phases[self.peak_phase]


Parts = dict[str, dict[str, int]]  # phase: bytes by component at its peak


def _summary(ledger: Ledger, layers: int) -> Parts:
    """Phases that exist whatever the number of layers; the layers' own become last, first and between."""
    names = {f"backward:layer{layers - 1}": "backward:last layer", "backward:layer0": "backward:first layer"}
    found = {names.get(phase, phase): parts for phase, parts in ledger.parts.items()}
    return {name: parts for name, parts in found.items() if not name.startswith("backward:layer")}


def extrapolated(run: Callable[[Step], Ledger], step: Step, few: int, more: int) -> Footprint:
    """The footprint of `step` by `run`s of `few` and of `more` layers, or of all where there are no more."""
    layers = step.shape.num_hidden_layers
    if layers <= more:
        found = _summary(run(step), layers)
    else:
        low, high = (_summary(run(replace(step, shape=step.shape.with_layers(n))), n) for n in (few, more))
        found: Parts = {}
        for phase, parts in low.items():
            names = {**parts, **high[phase]}
            ends = [(parts.get(name, 0), high[phase].get(name, 0)) for name in names]
            slopes = [(a, (b - a) * (layers - few) // (more - few)) for a, b in ends]
            found[phase] = {name: a + slope for name, (a, slope) in zip(names, slopes, strict=True)}
    found = {name: parts for name, parts in found.items() if name not in ("end", "loaded")}
    phases = {name: sum(parts.values()) for name, parts in found.items()}
    highest = max(phases, key=lambda name: phases[name])
    return Footprint(phases, {k: v for k, v in sorted(found[highest].items()) if v}, highest, found)


def footprint(step: Step) -> Footprint:
    """The peak of each phase and what it is made of: by walks, or by traces of a type that is none of `families`."""
    learned = step.shape.learned
    if learned is None:
        return extrapolated(walk, step, 2, 3)
    few = max(2, learned.period)
    return extrapolated(lambda step: _traced(step, 1), step, few, few + learned.period)


def allocations(step: Step) -> list[tuple[int, int]]:
    """Every allocation and release of the whole model's step, in order, for `replay`."""
    return recorded(step).events or []


def recorded(step: Step) -> Ledger:
    """The ledger of the whole model's two steps, with every allocation and release."""
    return walk(step, record=True) if step.shape.learned is None else _traced(step, 2)


def _traced(step: Step, steps: int) -> Ledger:
    try:
        from cruxy_triton.planner.trace import trace

        return trace(step, steps)
    except ImportError as error:
        raise UserError(
            f"{step.shape.name}: a model_type that the planner does not know by itself is planned by a trace, which "
            f"needs more than is here ({error}): pip install 'cruxy-triton[train]'"
        ) from None
