"""What the guard costs: the same training step with and without it, interleaved, as a ratio of each round.

Two copies of a small transformer take the same batches, one under the guard; which of them comes first changes from
round to round. Of each step forward, backward, optimizer and `zero_grad` are timed, by the clock and by the CPU time of
the process, which other programs on the machine move less. The guard takes no snapshots in these steps.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cruxy_triton.bench.characters import CharacterModel, Size
from cruxy_triton.guard import Policy, TrainingGuard
from cruxy_triton.optimizer import CruxyOptimizer

WARM_UP = 22  # steps before: the regime is stable and the update is measured every tenth step only
RANK = 8
# The model that `finetune --demo` makes, and its steps: 4 layers of width 192, 8 sequences of up to 128 tokens.
DEMO, DEMO_SYMBOLS = Size(layers=4, width=192, context=128, batch=8), 2048
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-4),
    "CruxyOptimizer": lambda params: CruxyOptimizer(params, lr=1e-4),
}


class Adapter(nn.Module):
    """A frozen layer with a low-rank addition, as LoRA's."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(0.02 * torch.randn(RANK, layer.in_features))
        self.b = nn.Parameter(torch.zeros(layer.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (x @ self.a.T) @ self.b.T


def _adapted(symbols: int, size: Size) -> CharacterModel:
    model = CharacterModel(symbols, size).requires_grad_(False)
    for module in list(model.blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(module, Adapter):
                setattr(module, name, Adapter(child))
    return model


MODELS: dict[str, tuple[Callable[[int, Size], CharacterModel], int, Size]] = {
    "0.8 M": (CharacterModel, 65, Size()),
    "demo": (CharacterModel, DEMO_SYMBOLS, DEMO),
    "demo, adapters": (_adapted, DEMO_SYMBOLS, DEMO),
}


class Contestant:
    """One copy of a model in training; `seconds` and `cpu_seconds` of each step that was measured."""

    def __init__(self, model: str, optimizer: str, guarded: bool):
        make, symbols, size = MODELS[model]
        torch.manual_seed(0)
        self.model = make(symbols, size)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[optimizer](self.params)
        self.guard = TrainingGuard(self.optimizer, self.model, Policy(snapshot_interval=1 << 30)) if guarded else None
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        loss = self.model.loss(inputs, targets)
        loss.backward()
        if self.guard is not None:
            self.guard.observe(loss)
        if isinstance(self.optimizer, CruxyOptimizer):
            self.optimizer.set_loss(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.cpu_seconds.append(time.process_time() - cpu)
        self.seconds.append(time.perf_counter() - start)


def measure(model: str, optimizer: str, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    _, symbols, size = MODELS[model]
    pair = [Contestant(model, optimizer, guarded) for guarded in (False, True)]
    for number in range(WARM_UP + rounds):
        generator = torch.Generator().manual_seed(number)
        rows = torch.randint(symbols, (size.batch, size.context + 1), generator=generator)
        for contestant in pair if number % 2 else pair[::-1]:
            contestant.step(rows[:, :-1], rows[:, 1:])
    row: dict[str, Any] = {
        "model": model,
        "parameters": sum(p.numel() for p in pair[0].params),
        "tensors": len(pair[0].params),
        "optimizer": optimizer,
    }
    for name, head in (("seconds", "step"), ("cpu_seconds", "CPU")):
        plain, guarded = (getattr(contestant, name)[WARM_UP:] for contestant in pair)
        row[f"{head} ms without"] = 1e3 * statistics.median(plain)
        row[f"{head} ratio"] = statistics.median([b / a for a, b in zip(plain, guarded, strict=True)])
        row[f"{head} ratio of least"] = min(guarded) / min(plain)
    return row


def table(rounds: int) -> dict[str, Any]:
    """A row per model and optimizer: medians over `rounds` rounds of the ratio, and the ratio of the least times."""
    rows = [measure(model, optimizer, rounds) for model in MODELS for optimizer in OPTIMIZERS]
    return {"rows": rows, "rounds": rounds, "threads": torch.get_num_threads(), "torch": torch.__version__}
