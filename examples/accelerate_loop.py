"""CruxyOptimizer under accelerate: prepared like any optimizer, and told the loss by `set_loss`.

    python examples/accelerate_loop.py

The model and data of training_loop.py for 100 steps, with accelerate and without: the losses are the same.
"""

from accelerate import Accelerator
from torch import nn
from training_loop import batches, compare_with_plain_loop, everything

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

    compare_with_plain_loop(cruxy, STEPS)


if __name__ == "__main__":
    main()
