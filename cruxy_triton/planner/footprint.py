"""The memory of one training step, by phase and component, in milliseconds and without torch.

Every phase's peak is linear in the number of layers, so walks of models of two and of three layers give the model's
own exactly. The peak is the maximum over phases, never a sum.

At the loss and with the stock loss this comes to W + 12 n_lora + act + (4h + 4) T + 12 V T bytes, with the weights'
bytes W, T = batch * seq tokens and, under checkpointing, act = 2 h T per layer (10 V T where the output object is not
kept).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

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


def _summary(ledger: Ledger, layers: int) -> dict[str, tuple[int, dict[str, int]]]:
    """Phases that exist whatever the number of layers; the layers' own become last, first and between."""
    names = {f"backward:layer{layers - 1}": "backward:last layer", "backward:layer0": "backward:first layer"}
    found = {}
    for phase, peak in ledger.phases.items():
        name = names.get(phase, phase)
        if not name.startswith("backward:layer"):
            found[name] = (peak, ledger.parts[phase])
    return found


def footprint(step: Step) -> Footprint:
    """The peak of each phase and what it is made of, from walks of two and three layers."""
    layers = step.shape.num_hidden_layers
    if layers <= 3:
        ledger = walk(step)
        found = _summary(ledger, layers)
    else:
        two, three = (_summary(walk(replace(step, shape=step.shape.with_layers(n))), n) for n in (2, 3))
        more = layers - 2
        found = {}
        for phase, (low, low_parts) in two.items():
            high, high_parts = three[phase]
            parts = {
                name: low_parts.get(name, 0) + more * (high_parts.get(name, 0) - low_parts.get(name, 0))
                for name in {**low_parts, **high_parts}
            }
            found[phase] = (low + more * (high - low), parts)
    found = {k: v for k, v in found.items() if k not in ("end", "loaded")}
    peak_phase = max(found, key=lambda name: found[name][0])
    return Footprint(
        phases={name: value for name, (value, _) in found.items()},
        components={k: v for k, v in sorted(found[peak_phase][1].items()) if v},
        peak_phase=peak_phase,
        parts={name: parts for name, (_, parts) in found.items()},
    )
