"""CruxyOptimizer under accelerate: prepared like any optimizer, and told the loss by `set_loss`.

    python examples/accelerate_loop.py

The model and data of training_loop.py for 100 steps, with accelerate and without: the losses are the same.
"""

import sys

from accelerate import Accelerator
from torch import nn
from training_loop import batches, everything, train

STEPS = 100


def main() -> None:
    accelerator = Accelerator(cpu=True)  # as the loop beside it; leave cpu=True out for your GPU
    model, cruxy, schedule = everything()
    model, optimizer, schedule = accelerator.prepare(model, cruxy, schedule)
    for inputs, targets in batches(0, STEPS):
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            cruxy.set_loss(loss.detach())  # accelerate's step() takes no loss; a tensor, so nothing waits for it
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    plain = everything()
    train(*plain, 0, STEPS)
    ours, theirs = ([row["loss"] for row in o.history()] for o in (cruxy, plain[1]))
    for step in range(0, STEPS, 20):
        sys.stdout.write(f"step {step + 1:3d}  loss {ours[step]:.6f}  plain loop {theirs[step]:.6f}\n")
    same = len(ours) == STEPS and ours == theirs
    sys.stdout.write(f"the losses of {STEPS} steps are {'the same' if same else 'NOT the same'}\n")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
