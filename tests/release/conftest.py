"""A small language model of layers, with a tied table, and what its steps are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SYMBOLS, CONTEXT = 17, 12


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Embedding, three layers, last norm, head; two layers hold more than the rest."""

    def __init__(self, tied: bool = True, reentrant: bool | None = None, width: int = 32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(SYMBOLS, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, SYMBOLS, bias=False)
        nn.init.normal_(self.embed.weight, std=0.2)
        if tied:
            self.head.weight = self.embed.weight
        self.reentrant = reentrant  # how layers are checkpointed; None: not at all

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))

    def loss(self, step: int, rows: int = 16) -> Tensor:
        """Cross-entropy of the next symbol, which is one of three: at best log 3. Step -1 is held out."""
        generator = torch.Generator().manual_seed(step + 1)
        text = torch.randint(SYMBOLS, (rows, 1), generator=generator)
        for _ in range(CONTEXT):
            noise = torch.randint(3, (rows, 1), generator=generator)
            text = torch.cat((text, (3 * text[:, -1:] + 1 + noise) % SYMBOLS), 1)
        logits = self(text[:, :-1]).float()
        return nn.functional.cross_entropy(logits.reshape(-1, SYMBOLS), text[:, 1:].reshape(-1))


@pytest.fixture
def make() -> Callable[..., Model]:
    """make(dtype, tied=, reentrant=) -> the same model at every call."""

    def new(dtype: torch.dtype = torch.float32, **kwargs: Any) -> Model:
        return Model(**kwargs).to(dtype)

    return new


@pytest.fixture
def run() -> Callable[..., list[float]]:
    """run(model, optimizer, released, first, last) -> the losses of these steps."""

    def steps(model: Model, optimizer: Any, released: Any, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            loss = released.scale(model.loss(step))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return steps
