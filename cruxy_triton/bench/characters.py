"""A small character model and its text, for benchmarks that train hundreds of times on two cores."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cruxy_triton.errors import UserError


@dataclass(frozen=True)
class Size:
    layers: int = 4
    width: int = 128
    context: int = 64
    batch: int = 16
    steps: int = 300
    evaluations: int = 12  # batches of the held-out text



def embedded_text() -> str:
    """A million characters that every machine has: the sources of torch's own `nn` package."""
    sources = sorted(Path(nn.__file__).parent.joinpath("modules").glob("*.py"))
    return "".join(path.read_text(encoding="utf-8") for path in sources)[:1_000_000]


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it cannot be read, is not UTF-8, or too short for a benchmark.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
    if len(text) < 10_000:
        raise UserError(f"{path} has {len(text):,} characters; expected a text of at least 10,000")
    return text


class Text:
    """Character codes, the last tenth for validation; batches by number, the same for everybody."""

    def __init__(self, text: str, size: Size):
        symbols = {c: i for i, c in enumerate(sorted(set(text)))}
        codes = torch.tensor([symbols[c] for c in text])
        cut = int(0.9 * len(codes))
        self.symbols, self.size = len(symbols), size
        self.train, self.held_out = codes[:cut], codes[cut:]

    def batch(self, number: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        source = self.held_out if held_out else self.train
        generator = torch.Generator().manual_seed(number)
        starts = torch.randint(len(source) - self.size.context - 1, (self.size.batch,), generator=generator)
        rows = source[starts[:, None] + torch.arange(self.size.context + 1)]
        return rows[:, :-1], rows[:, 1:]


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (t.reshape(shape).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class CharacterModel(nn.Module):
    """A decoder with learned positions. std: of its weights at the start; None: as torch initialises each module."""

    def __init__(self, symbols: int, size: Size, std: float | None = 0.02):
        super().__init__()
        self.embed, self.position = nn.Embedding(symbols, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*[Block(size.width) for _ in range(size.layers)])
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, symbols, bias=False)
        if std is None:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(inputs) + self.position.weight[: inputs.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def held_out_loss(self, text: Text) -> float:
        """Mean over batches of held-out text, the same for everybody."""
        batches = range(10**9, 10**9 + text.size.evaluations)
        return statistics.fmean(float(self.loss(*text.batch(i, held_out=True))) for i in batches)
