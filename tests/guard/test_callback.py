"""The callback in the Trainer: a NaN batch, a checkpoint that the Trainer wrote, a resumed run, a run that is ended."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from cruxy_triton import files  # noqa: E402
from cruxy_triton.guard import GuardCallback, Policy, read_events  # noqa: E402


def tiny_model() -> Any:
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


ROWS = [{"input_ids": (ids := [(5 * i + 3 * j) % 32 for j in range(8)]), "labels": ids} for i in range(64)]


class Poisoned(transformers.Trainer):
    """Multiplies the gradient by NaN in the steps of `poisoned`."""

    poisoned: tuple[int, ...] = ()

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, *args, **kwargs)
        if self.state.global_step in self.poisoned:
            next(iter(model.parameters())).grad.mul_(math.nan)
        return loss


def trainer(folder: Path, callback: GuardCallback, poisoned: Any = (), steps: int = 24, **settings: Any) -> Poisoned:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=steps,
        learning_rate=3e-3, lr_scheduler_type="cosine", max_grad_norm=0.0, logging_steps=4, report_to=[],
        disable_tqdm=True, use_cpu=True, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    made = Poisoned(model=tiny_model(), args=arguments, train_dataset=ROWS, callbacks=[callback])
    made.poisoned = tuple(poisoned)
    return made


def test_a_poisoned_step_is_skipped_and_logged(tmp_path):
    callback = GuardCallback()
    run = trainer(tmp_path, callback, poisoned=[9])
    run.train()
    (event,) = [event for event in read_events(tmp_path / "guard_events.jsonl") if event.kind == "skip"]
    assert (event.step, event.batch, event.layer) == (10, "of step 10", "all 12 tensors")
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["guard_regime"] for entry in logged][-1] in ("stable", "stressed", "recovering")
    assert all(math.isfinite(float(p.detach().abs().max())) for p in run.model.parameters())
    assert callback.guard is not None
    # The Trainer's own loss of the last log is the mean over its steps, the guard's the one of the last step.
    assert callback.guard.metrics["loss"] == pytest.approx(logged[-1]["loss"], rel=0.2)


def test_checkpoints_are_sealed_and_resume_exactly(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 8, "save_total_limit": 3}
    whole = GuardCallback()
    first = trainer(tmp_path / "a", whole, poisoned=[5], **settings)
    first.train()
    folder = tmp_path / "a" / "checkpoint-16"
    assert files.damage(folder) is None
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 16
    resumed = GuardCallback()
    second = trainer(tmp_path / "a", resumed, poisoned=[5], **settings)
    second.train(resume_from_checkpoint=str(folder))
    assert resumed.guard is not None
    assert whole.guard is not None
    assert resumed.guard.metrics == whole.guard.metrics
    assert resumed.guard.metrics["step"] == 24
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert files.damage(folder) == "model.safetensors is not as it was written"


def test_a_stop_ends_the_run(tmp_path):
    callback = GuardCallback(Policy(max_rollbacks=0))
    run = trainer(tmp_path, callback, poisoned=range(6, 100), steps=60)
    run.train()
    assert run.state.global_step == 12  # five bad steps, read one step late
    assert callback.guard is not None
    assert callback.guard.stopped is not None
    assert "5 steps in a row were not finite" in callback.guard.stopped


def test_attached_first_it_feeds_the_reporters(tmp_path):
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs or {}))

    callback = GuardCallback()
    run = trainer(tmp_path, callback, steps=4)
    run.callback_handler.callbacks.remove(callback)
    run.callback_handler.callbacks.insert(0, Reporter())
    callback.attach(run)
    run.train()
    assert "guard_regime" in seen[0]
