"""The guard in a plain PyTorch loop, above `torch.optim.AdamW`.

    python examples/guard_plain_loop.py [--tiny]

Trains a small character model on this very file at thirty times a good learning rate, with a corrupt batch and a NaN
in the weights on the way: once alone and once guarded. No network, seconds on a CPU.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import nn

from cruxy_triton.guard import TrainingGuard

CONTEXT = 16


def train(steps: int, guarded: bool) -> float:
    torch.manual_seed(0)
    source = Path(__file__).read_text(encoding="utf-8")
    symbols = sorted(set(source))
    text = torch.tensor([symbols.index(c) for c in source])
    model = nn.Sequential(
        nn.Embedding(len(symbols), 24), nn.Flatten(), nn.Linear(24 * CONTEXT, 128), nn.GELU(),
        nn.Linear(128, len(symbols)),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    guard = TrainingGuard(optimizer, model) if guarded else None
    for step in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (64,))
        inputs, targets = text[starts[:, None] + torch.arange(CONTEXT)], text[starts + CONTEXT]
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        if step == steps // 3:  # what a broken batch may do
            model[2].weight.grad.mul_(1e6)
        if step == steps // 2:  # what a broken memory may do
            with torch.no_grad():
                model[4].weight[0, 0] = math.nan
        if guard is not None:
            guard.observe(loss, batch=step)
        optimizer.step()
    with torch.no_grad():
        starts = torch.arange(0, len(text) - CONTEXT, 3)
        inputs, targets = text[starts[:, None] + torch.arange(CONTEXT)], text[starts + CONTEXT]
        final = nn.functional.cross_entropy(model(inputs), targets).item()
    if guard is not None:
        print(guard.finish())
    return final


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="120 steps instead of 600")
    steps = 120 if parser.parse_args().tiny else 600
    alone, guarded = train(steps, guarded=False), train(steps, guarded=True)
    print(f"final loss alone {alone:.3f}, guarded {guarded:.3f}")
    sys.exit(0 if math.isfinite(guarded) and not guarded > alone else 1)


if __name__ == "__main__":
    main()
