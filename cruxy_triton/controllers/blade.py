"""BLADE: a multiplier of the step size for each layer, from 1 bit of 16 of its gradients (docs/laws.md, section 7).

The arithmetic is `cruxy_kernels.blade_step`; here are its layers, its state and the tables of a step's tensors.
"""

from typing import Any

from torch import Tensor

import cruxy_kernels as kernels
from cruxy_kernels import layout as L
from cruxy_triton.controllers.layers import LayerControl, StepTensors


class Blade(LayerControl):
    """BLADE over the layers of an optimizer.

    Args:
        response: "damped", in which a layer that is more volatile than the median steps less, or "paper", the
            published law, in which it steps more.
        seed: the paper's `indices_seed`.

    Raises ValueError for an unknown response or a seed out of range.
    """

    kind = "blade"

    def __init__(self, response: str = "damped", seed: int = L.BLADE_SEED) -> None:
        if response not in ("damped", "paper"):
            raise ValueError(f"response is {response!r}; expected 'damped' or 'paper'")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 31:
            raise ValueError(f"seed is {seed!r}; expected a whole number from 0 to below 2^31")
        super().__init__(response, seed)
        self._tables: tuple[Any, kernels.LayerTensors] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": None}

    def forget(self) -> None:
        self._tables = None

    def new_state(self, numels: list[int]) -> dict[str, Tensor]:
        return kernels.new_blade_state(numels, self.seed).tensors()

    def carry(self, old: dict[str, Tensor], new: dict[str, Tensor], rows: dict[int, int]) -> None:
        for name, value in new.items():
            if name == "shared":
                value.copy_(old[name])
                continue
            for to, source in rows.items():
                value[to] = old[name][source]

    def factors(
        self, tensors: StepTensors, telemetry: Tensor, skip: Tensor, loss: Tensor | None, entropy: Tensor | None,
        grad_scale: Tensor | None, backend: str | None,
    ) -> Tensor:
        if self._tables is None or tensors.key is None or self._tables[0] is not tensors.key:
            homes, grads = [self.layers.home[p] for p in tensors.params()], tensors.grads()
            table = kernels.LayerTensors(
                [layer for layer, _ in homes], [start for _, start in homes], [g.numel() for g in grads],
                [g.element_size() for g in grads], len(self.layers.names), device=telemetry.device,
                spans=tensors.spans(), cells=tensors.cells(),
            )  # fmt: skip
            self._tables = tensors.key, table
        table = self._tables[1]
        grads = [] if table.given_cells else tensors.grads()
        kernels.blade_step(
            kernels.BladeState(**self.state), table, telemetry, skip, grads, loss=loss, entropy=entropy,
            grad_scale=grad_scale, response=self.response, seed=self.seed, backend=backend,
        )  # fmt: skip
        return table.factors
