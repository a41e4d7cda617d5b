"""SKETCH-ALIGN: one multiplier for the whole model, from a sketch of 4,096 gradient elements; the baseline of BLADE.

Published is only "model-level controller, 4,096-float sketch, same beta and clamp". Ours (docs/laws.md, section 7): the
gradient at 4,096 fixed random places, alignment = its cosine with the sketch before, and otherwise the law of BLADE
with one layer, so that the median is the layer's own: m = clamp(d^2, .3, 1.7). (The damped response would be 1 always.)
PyTorch operators on the gradients' device, one launch per tensor. No value is read by the host.
"""

import torch
from torch import Tensor

from cruxy_kernels import layout as L
from cruxy_triton.controllers.layers import LayerControl, Layers, StepTensors

SKETCH = 4096


class SketchAlign(LayerControl):
    """SKETCH-ALIGN over all tensors of an optimizer. seed: of the places, a whole number of at least 0."""

    kind = "sketch_align"

    def __init__(self, seed: int = L.BLADE_SEED) -> None:
        super().__init__("paper", seed)
        self._places: dict[Tensor, tuple[Tensor, Tensor]] | None = None

    def forget(self) -> None:
        self._places = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_places": None}

    def new_state(self, numels: list[int]) -> dict[str, Tensor]:
        return {
            "sketch": torch.zeros(SKETCH),
            # Averages as in BLADE: norm, 1 + alignment; loss, entropy, steps that were not skipped. 0: none yet.
            "averages": torch.zeros(L.NUM_LAYER),
            "shared": torch.zeros(L.NUM_SHARED),
            "multipliers": torch.ones(len(numels)),
        }

    def carry(self, old: dict[str, Tensor], new: dict[str, Tensor], rows: dict[int, int]) -> None:
        """Other tensors: the sketch begins anew, what is known of loss and norm stays."""
        new["averages"][L.LAYER_NORM] = old["averages"][L.LAYER_NORM]
        new["shared"].copy_(old["shared"])

    def _places_on(self, device: torch.device) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """Of each tensor its elements in the sketch, and where they stand there."""
        if self._places is None:
            layers: Layers = self.layers
            numels = [p.numel() for p in layers.home]
            ends = torch.tensor(numels).cumsum(0)
            generator = torch.Generator().manual_seed(self.seed)
            places = torch.randint(int(ends[-1]), (SKETCH,), generator=generator).sort().values
            owner = torch.searchsorted(ends, places, right=True)
            self._places = {}
            for i, (p, numel) in enumerate(zip(layers.home, numels, strict=True)):
                where = (owner == i).nonzero().flatten()
                if len(where):
                    self._places[p] = (places[where] - (ends[i] - numel)).to(device), where.to(device)
        return self._places

    def factors(
        self, tensors: StepTensors, telemetry: Tensor, skip: Tensor, loss: Tensor | None, entropy: Tensor | None,
        grad_scale: Tensor | None, backend: str | None,
    ) -> Tensor:
        state, device = self.state, telemetry.device
        places = self._places_on(device)
        sketch = torch.zeros(SKETCH, device=device)
        for p, grad in zip(tensors.params(), tensors.grads(), strict=True):
            if p in places:
                elements, where = places[p]
                found = torch.take(grad.detach(), elements.to(grad.device)).to(device, torch.float32)
                sketch.index_copy_(0, where, found)
        norm = telemetry[:, L.SUM_SQ].sum().sqrt()
        if grad_scale is not None:
            sketch, norm = sketch / grad_scale, norm / grad_scale.reshape(())
        before, (old_norm, old_alignment) = state["sketch"], state["averages"].unbind()
        lengths = [torch.linalg.vector_norm(s) for s in (sketch, before)]
        compared = (lengths[0] > 0) & (lengths[1] > 0)
        alignment = 1 + ((sketch / lengths[0]) * (before / lengths[1])).sum()
        old_loss, old_entropy, steps = state["shared"].unbind()

        def ratio(value: Tensor, average: Tensor, counts: Tensor) -> Tensor:
            return torch.where(counts, torch.log2(value / average), 0.0)

        def average(old: Tensor, value: Tensor, counts: Tensor) -> Tensor:
            moved = torch.where(old > 0, L.BLADE_BETA * old + (1 - L.BLADE_BETA) * value, value)
            return torch.where(counts, moved, old)

        part = (norm > 0) & (old_norm > 0)
        log_s, signals, shared = ratio(norm, old_norm, part), torch.ones((), device=device), []
        for value, old in ((loss, old_loss), (entropy, old_entropy)):
            if value is None:
                shared.append(old)
                continue
            usable = (value > 0) & (value < torch.inf)
            both = usable & (old > 0)
            log_s, signals = log_s + ratio(value, old, both), signals + both
            shared.append(average(old, value, usable))
        log_c = -0.5 * ratio(alignment, old_alignment, compared & (old_alignment > 0))
        multiplier = torch.exp2(2 * (log_s / signals + log_c)).clamp(L.BLADE_MIN, L.BLADE_MAX)
        multiplier = torch.where(part, multiplier, 1.0)
        new = {
            "sketch": sketch,
            "averages": torch.stack([average(old_norm, norm, norm > 0), average(old_alignment, alignment, compared)]),
            "shared": torch.stack([*shared, steps + 1]),
            "multipliers": multiplier.expand(len(self.layers.names)),
        }
        good = skip.reshape(()) <= 0
        for name, value in new.items():
            state[name].copy_(torch.where(good, value, state[name]))
        return state["multipliers"][:1].expand(len(tensors.params())).contiguous()
