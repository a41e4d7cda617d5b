"""Fixtures of the optimizer tests: small models with data, and PyPI `cruxy` 2.1.0 to compare with."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

RULES = {"adamw": {"use_lion": False}, "lion": {"use_lion": True, "betas": (0.9, 0.99)}}
MODES = ("stability_v1", "stability_v2", "meta3")


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=list(RULES))
def rule(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(RULES[request.param])


class Transformer(nn.Module):
    """One causal block over 17 symbols, width 32: 9,800 parameters.

    Without biases in the attention: the gradient of a key's bias is 0 but for rounding, and both AdamW and
    Lion turn such noise into whole steps, so that no two implementations could agree.
    """

    def __init__(self, symbols: int = 17, width: int = 32, context: int = 16):
        super().__init__()
        self.embed, self.position = nn.Embedding(symbols, width), nn.Parameter(torch.randn(context, width) / 10)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, symbols, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x))


@pytest.fixture
def mlp() -> Callable[[], tuple[nn.Module, Callable[[nn.Module, int], Tensor]]]:
    """Makes (model, loss of a step): a regression of a sum of sines; the same at every call."""

    def make() -> tuple[nn.Module, Callable[[nn.Module, int], Tensor]]:
        generator = torch.Generator().manual_seed(3)
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
        x = torch.randn(256, 10, generator=generator)
        y = (2 * x).sin().sum(1, keepdim=True)

        def loss(model: nn.Module, step: int) -> Tensor:
            rows = torch.arange(32) + 32 * (step % 8)
            return (model(x[rows]) - y[rows]).square().mean()

        return model, loss

    return make


@pytest.fixture
def transformer() -> Callable[[], tuple[nn.Module, Callable[[nn.Module, int], Tensor]]]:
    """Makes (model, loss of a step): next-symbol prediction on a periodic sequence with noise."""

    def make() -> tuple[nn.Module, Callable[[nn.Module, int], Tensor]]:
        generator = torch.Generator().manual_seed(4)
        torch.manual_seed(2)
        model = Transformer()
        text = (torch.arange(4096) * 5 + torch.randint(0, 3, (4096,), generator=generator)) % 17

        def loss(model: nn.Module, step: int) -> Tensor:
            starts = torch.randint(0, 4000, (8,), generator=torch.Generator().manual_seed(step))
            window = torch.stack([text[s : s + 17] for s in starts.tolist()])
            logits = model(window[:, :-1])
            return nn.functional.cross_entropy(logits.reshape(-1, 17), window[:, 1:].reshape(-1))

        return model, loss

    return make


@pytest.fixture
def sdk() -> Any:
    """PyPI `cruxy` 2.1.0, which implements the published laws."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("cruxy")


@pytest.fixture
def train() -> Callable[..., list[float]]:
    """Trains `steps` steps and returns the losses."""

    def run(model: nn.Module, optimizer: Any, loss: Any, steps: int, start: int = 0, **kwargs: Any) -> list[float]:
        losses = []
        for step in range(start, start + steps):
            optimizer.zero_grad()
            value = loss(model, step)
            value.backward()
            optimizer.step(loss=value.item(), **kwargs)
            losses.append(value.item())
        return losses

    return run
