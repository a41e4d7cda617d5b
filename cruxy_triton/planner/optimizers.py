"""What each optimizer keeps of a trainable parameter: one table, from which every size follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# State bits: (values per byte, values that share one 2-byte scale or 0): `cruxy_kernels.CODECS`, without torch.
CODECS = {32: (0.25, 0), 8: (1, 64), 4: (2, 64)}
SCALE = 2  # bytes
CHUNK, ENTRY = 1024, 12 * 8  # elements per program, bytes of a tensor's entry: `cruxy_kernels.tables`
# Bytes: 1,000 steps' metrics; of each tensor the telemetry of its gradient and the norms that it has had
# (`cruxy_kernels.layout`: NUM_SLOTS, NUM_TELEMETRY, NUM_HISTORY, in float32).
HISTORY, STATISTICS, NORMS = 1000 * 112 * 4, 4 * 4, 2 * 4


@dataclass(frozen=True)
class Optimizer:
    """`moments`: state tensors of the parameter's size, stored in `bits`; `transient`: bytes per parameter that a
    step takes for its own duration; `finetune`: its --optimizer there, "" where `finetune` does not offer it."""

    moments: int
    bits: int = 32
    transient: int = 0
    finetune: str = ""

    def tensors(self, n: int) -> list[int]:
        """Bytes of each state tensor of a parameter of `n` elements."""
        packed, shared = CODECS[self.bits]
        each = [math.ceil(n / packed)] + ([SCALE * -(-n // shared)] if shared else [])
        return each * self.moments

    def beside(self, sizes: Sequence[int], device: str) -> list[int]:
        """Bytes of what it keeps beside the state for a layer of parameters of these `sizes`, where gradients are
        released: which tensor and which chunk of it a program serves (a CPU has none), and what it knows of each
        tensor. Without release this and `history` are left out: half a MiB with adapters, 0.1 % of a whole model."""
        if not self.controlled:
            return []
        chunks = [4 * sum(-(-n // CHUNK) for n in sizes)] * 2 if device != "cpu" else []
        return [*chunks, (STATISTICS + NORMS + (ENTRY if chunks else 0)) * len(sizes)]

    @property
    def history(self) -> list[int]:
        """Bytes of the metrics that it remembers."""
        return [HISTORY] if self.controlled else []

    @property
    def controlled(self) -> bool:
        """Whether it is CruxyOptimizer."""
        return self.finetune.startswith("cruxy")

    @property
    def bytes_per_parameter(self) -> float:
        packed, shared = CODECS[self.bits]
        return self.moments * (1 / packed + (SCALE / shared if shared else 0))


# Those of `cruxy` and `cruxy-lion` are CruxyOptimizer's: one pass over the tensors, without temporaries. torch-adamw is
# torch.optim.AdamW in its CUDA default (foreach), which makes the square roots of all exp_avg_sq at once.
OPTIMIZERS = {
    "adamw-fp32": Optimizer(2, finetune="cruxy"),
    "adamw-8bit": Optimizer(2, 8, finetune="cruxy"),
    "lion-fp32": Optimizer(1, finetune="cruxy-lion"),
    "lion-8bit": Optimizer(1, 8, finetune="cruxy-lion"),
    "lion-4bit": Optimizer(1, 4, finetune="cruxy-lion"),
    "torch-adamw": Optimizer(2, transient=4, finetune="adamw"),
    "sgd": Optimizer(0, finetune="sgd"),
}
# The same by what `cruxy-triton finetune` calls them: (--optimizer, --state-bits)
FINETUNE_OPTIMIZERS = {name: (x.finetune, x.bits) for name, x in OPTIMIZERS.items() if x.finetune}
