"""CruxyOptimizer in Lightning: returned by `configure_optimizers`; Lightning's closure gives it the loss.

    pip install lightning
    python examples/lightning_loop.py

The model and data of training_loop.py for 100 steps, in Lightning and without: the losses are the same.
"""

import sys
from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader
from training_loop import batches, everything, train

STEPS = 100


class Characters(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.cruxy, self.schedule = everything()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.model(inputs), targets)

    def configure_optimizers(self) -> Any:
        return {"optimizer": self.cruxy, "lr_scheduler": {"scheduler": self.schedule, "interval": "step"}}


def main() -> None:
    module = Characters()
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(list(batches(0, STEPS)), batch_size=None))

    plain = everything()
    train(*plain, 0, STEPS)
    ours, theirs = ([row["loss"] for row in o.history()] for o in (module.cruxy, plain[1]))
    for step in range(0, STEPS, 20):
        sys.stdout.write(f"step {step + 1:3d}  loss {ours[step]:.6f}  plain loop {theirs[step]:.6f}\n")
    same = len(ours) == STEPS and ours == theirs
    sys.stdout.write(f"the losses of {STEPS} steps are {'the same' if same else 'NOT the same'}\n")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
