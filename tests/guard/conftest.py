"""Fixtures of the guard's tests: a small regression that trains in milliseconds, over several optimizers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cruxy_triton import CruxyOptimizer
from cruxy_triton.guard import TrainingGuard

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=2e-2, momentum=0.9),
    "CruxyOptimizer": lambda p: CruxyOptimizer(p, lr=5e-3),
}


@pytest.fixture(params=list(OPTIMIZERS))
def make_optimizer(request: pytest.FixtureRequest) -> Callable[[Any], torch.optim.Optimizer]:
    return OPTIMIZERS[request.param]


class Regression:
    """Model, data and a step; `before_step(model, step)` may break something between backward and step."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(3)
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
        self.x = torch.randn(256, 10, generator=generator)
        self.y = self.x.sin().sum(1, keepdim=True) + 0.3 * torch.randn(256, 1, generator=generator)

    def loss(self, step: int) -> Tensor:
        rows = torch.randint(256, (32,), generator=torch.Generator().manual_seed(step))
        return (self.model(self.x[rows]) - self.y[rows]).square().mean()

    def train(
        self,
        optimizer: Any,
        guard: TrainingGuard | None,
        steps: int,
        start: int = 0,
        broken: Callable[[nn.Module, int], None] | None = None,
    ) -> list[float]:
        losses = []
        for step in range(start, start + steps):
            optimizer.zero_grad()
            loss = self.loss(step)
            loss.backward()
            if broken is not None:
                broken(self.model, step)
            if guard is not None:
                guard.observe(loss, batch=step)
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def params(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.fixture
def regression() -> Callable[..., Regression]:
    return Regression
