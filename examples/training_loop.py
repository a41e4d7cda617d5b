"""CruxyOptimizer in a plain PyTorch loop: schedules, checkpoints and what the controller did.

    python examples/training_loop.py

Trains a small character model on this very file for 200 steps, saves half-way, continues from the file, and
shows that both runs end at the same loss. No network, a few seconds on a CPU.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cruxy_triton import CruxyOptimizer

CONTEXT, STEPS = 32, 200
SOURCE = Path(__file__).read_text(encoding="utf-8")
SYMBOLS = sorted(set(SOURCE))
TEXT = torch.tensor([SYMBOLS.index(character) for character in SOURCE])


def batches(first: int, last: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each step the 64 contexts and the characters that follow."""
    for step in range(first, last):
        starts = torch.randint(len(TEXT) - CONTEXT, (64,), generator=torch.Generator().manual_seed(step))
        yield torch.stack([TEXT[i : i + CONTEXT] for i in starts.tolist()]), TEXT[starts + CONTEXT]


def make_model() -> nn.Module:
    symbols = len(SYMBOLS)
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(symbols, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 128), nn.GELU(),
                         nn.Linear(128, symbols))  # fmt: skip


def make_optimizer(model: nn.Module) -> CruxyOptimizer:
    """Two groups: no weight decay on vectors. The rate belongs to you (and the scheduler below)."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return CruxyOptimizer(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], mode="meta3", lr=3e-3
    )


def everything() -> tuple[nn.Module, CruxyOptimizer, Any]:
    model = make_model()
    optimizer = make_optimizer(model)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)


def train(model: nn.Module, optimizer: CruxyOptimizer, schedule: Any, first: int, last: int) -> None:
    for step, (inputs, targets) in enumerate(batches(first, last), first):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)  # a tensor: on a GPU nothing waits for it
        schedule.step()
        if (step + 1) % 40 == 0:
            m = optimizer.metrics()
            sys.stdout.write(
                f"step {m['step']:4d}  loss {m['loss']:.3f}  lr {m['lr']:.2e} (scale {m['lr_scale']:.2f}, "
                f"phase {m['phase']:.2f})  gradient {m['grad_norm']:.2f}, clipped at {m['clip_threshold']:.2f}\n"
            )


def compare_with_plain_loop(optimizer: CruxyOptimizer, steps: int) -> None:
    """Ends the program: 0 where the losses of this optimizer's run are those of the loop here."""
    plain = everything()
    train(*plain, 0, steps)
    ours, theirs = ([row["loss"] for row in o.history()] for o in (optimizer, plain[1]))
    for step in range(0, steps, 20):
        sys.stdout.write(f"step {step + 1:3d}  loss {ours[step]:.6f}  plain loop {theirs[step]:.6f}\n")
    same = len(ours) == steps and ours == theirs
    sys.stdout.write(f"the losses of {steps} steps are {'the same' if same else 'NOT the same'}\n")
    raise SystemExit(0 if same else 1)


def main() -> None:
    model, optimizer, schedule = everything()
    train(model, optimizer, schedule, 0, STEPS // 2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.pt"
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save(state, file)
        train(model, optimizer, schedule, STEPS // 2, STEPS)

        sys.stdout.write("again from the checkpoint:\n")
        saved = torch.load(file, weights_only=True)
    resumed, resumed_optimizer, resumed_schedule = everything()
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    resumed_schedule.load_state_dict(saved["schedule"])
    train(resumed, resumed_optimizer, resumed_schedule, STEPS // 2, STEPS)

    same = optimizer.metrics()["loss"] == resumed_optimizer.metrics()["loss"]
    sys.stdout.write(f"the resumed run is {'the same' if same else 'NOT the same'}\n")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
