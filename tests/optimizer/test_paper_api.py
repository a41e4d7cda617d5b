"""Every snippet of the two seed documents on Cruxy, with `cruxy` replaced by `cruxy_triton`."""

import pytest
import torch
from torch import nn


def test_white_paper_snippet():
    """White paper, section 7."""
    torch.manual_seed(0)
    weights = nn.Linear(10, 1)

    def model(batch):
        return weights(batch).square().mean()

    model.parameters = weights.parameters  # the paper's model returns the loss
    dataloader = [torch.randn(8, 10) for _ in range(20)]
    first = model(dataloader[0]).item()

    from cruxy_triton import CruxyOptimizer

    optimizer = CruxyOptimizer(
        model.parameters(),
        mode="meta3",  # or use_lion=True
        lr=1e-3,
    )

    # Training loop
    for batch in dataloader:
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step(loss=loss.item())

    assert model(dataloader[0]).item() < first


@pytest.mark.parametrize("mode", ["stability_v1", "stability_v2", "meta3"])
def test_readme_basic_usage(mode):
    """README of the SDK, "Basic Usage", in each of its modes."""
    torch.manual_seed(0)
    data = [(x := torch.randn(16, 10), x.sum(1, keepdim=True)) for _ in range(4)] * 50

    from cruxy_triton import CruxyOptimizer

    model = torch.nn.Linear(10, 1)
    optimizer = CruxyOptimizer(
        model.parameters(),
        mode=mode,  # Options: "stability_v1", "stability_v2", "meta3"
        lr=1e-3,
    )
    losses = []

    # Training Loop
    for batch in data:
        inputs, targets = batch
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = torch.nn.MSELoss()(outputs, targets)
        loss.backward()

        # Pass loss to step() for curvature estimation
        optimizer.step(loss=loss.item())
        losses.append(loss.item())

    assert sum(losses[-4:]) < 0.99 * sum(losses[:4])


def test_readme_trainer_integration(tmp_path):
    """README of the SDK, "HuggingFace Trainer Integration"; the Trainer also saves and resumes."""
    transformers = pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from cruxy_triton import CruxyOptimizer

    class CruxyTrainer(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = CruxyOptimizer(self.model.parameters(), mode="meta3", lr=self.args.learning_rate)
            return self.optimizer

    transformers.set_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    rows = [{"input_ids": (ids := [(3 * i + j) % 32 for j in range(12)]), "labels": ids} for i in range(32)]

    def trainer(folder, **kwargs):
        transformers.set_seed(0)
        arguments = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=4, max_steps=12, learning_rate=1e-2, save_steps=6,
            report_to=[], logging_steps=1, use_cpu=True, disable_tqdm=True, max_grad_norm=0.0, **kwargs,
        )  # fmt: skip
        return CruxyTrainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=rows)

    whole = trainer(tmp_path / "whole")
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < 0.85 * losses[0]

    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    unwrapped = getattr(resumed.optimizer, "optimizer", resumed.optimizer)
    assert unwrapped.metrics()["step"] == 12
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
