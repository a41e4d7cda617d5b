"""CruxyOptimizer in Lightning: returned by `configure_optimizers`; Lightning's closure gives it the loss.

    pip install lightning
    python examples/lightning_loop.py

The model and data of training_loop.py for 100 steps, in Lightning and without: the losses are the same.
"""

from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader
from training_loop import batches, compare_with_plain_loop, everything

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

    compare_with_plain_loop(module.cruxy, STEPS)


if __name__ == "__main__":
    main()
