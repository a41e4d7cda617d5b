"""The callback in Hugging Face's Trainer and in TRL's: what the optimizer is told, what the log says, the guard."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from cruxy_triton import CruxyOptimizer, files  # noqa: E402
from cruxy_triton.guard import Policy, read_events  # noqa: E402
from cruxy_triton.integrations.transformers import CruxyCallback, optimizer_cls_and_kwargs  # noqa: E402


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


def arguments(folder: Path, steps: int, kind: Any = transformers.TrainingArguments, **settings: Any) -> Any:
    usual = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "max_grad_norm": 0.0,
        "lr_scheduler_type": "cosine", "logging_steps": 4, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return kind(output_dir=str(folder), max_steps=steps, report_to=[], use_cpu=True, **{**usual, **settings})


def trainer(
    folder: Path, callback: CruxyCallback | None, poisoned: Any = (), steps: int = 24, ours: Any = None, **settings: Any
) -> Poisoned:
    """`ours`: arguments of CruxyOptimizer; None: the Trainer's own AdamW."""
    args = arguments(folder, steps, **settings)
    optimizer = None if ours is None else optimizer_cls_and_kwargs(args, **ours)
    made = Poisoned(model=tiny_model(), args=args, train_dataset=ROWS, optimizer_cls_and_kwargs=optimizer)
    made.poisoned = tuple(poisoned)
    if callback is not None:
        callback.attach(made)
    return made


def logged(run: Any) -> list[dict[str, Any]]:
    return [entry for entry in run.state.log_history if "loss" in entry]


# -- the optimizer ------------------------------------------------------------------------------


def test_the_loss_that_the_optimizer_gets_is_the_loss_that_the_trainer_logs(tmp_path):
    run = trainer(tmp_path, CruxyCallback(), steps=12, ours={"seed": 3}, logging_steps=1)
    run.train()
    optimizer = run.optimizer.optimizer
    assert isinstance(optimizer, CruxyOptimizer)
    assert optimizer.seed == 3
    assert optimizer.param_groups[0]["initial_lr"] == 3e-3
    history = optimizer.history()
    # The Trainer rounds what it logs.
    assert [row["loss"] for row in history] == pytest.approx([entry["loss"] for entry in logged(run)], abs=1e-4)
    for name in ("phase", "curvature", "beta2", "clip_coef"):
        assert [entry[name] for entry in logged(run)] == [row[name] for row in history], name
    assert [entry["lr_used"] for entry in logged(run)] == [row["lr"] for row in history]


def test_trl_gives_the_loss_too(tmp_path, small_model):
    """Its loss is computed outside of the model's forward, so that no hook on the model would see one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder = small_model()
    args = arguments(tmp_path, 4, SFTConfig, logging_steps=1, max_length=16, bf16=False)
    run = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder), args=args,
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=_dataset([{"text": f"{i} and {i + 1} make {2 * i + 1}"} for i in range(40)]),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, mode="stability_v2"),
    )  # fmt: skip
    CruxyCallback(guard=Policy(act=False)).attach(run)
    run.train()
    losses = [entry["loss"] for entry in logged(run)]
    assert [row["loss"] for row in run.optimizer.optimizer.history()] == pytest.approx(losses, abs=1e-3)
    assert len(losses) == 4
    assert "regime" in logged(run)[-1]


def _dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors, at each of which it would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_with_the_callback_reads_nothing_more(tmp_path):
    """The optimizer's own backend is PyTorch here: its host reads are the same with and without a loss."""

    def reads(callback: CruxyCallback | None) -> int:
        run = trainer(tmp_path, callback, steps=8, ours={"backend": "torch"}, logging_strategy="no")
        if callback is None:  # a loss too, so that the same law is computed
            run.add_callback(_Constant())
        with Reads() as mode:
            run.train()
        return mode.count

    assert reads(CruxyCallback()) == reads(None)


class _Constant(transformers.TrainerCallback):
    loss = torch.ones(())

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        optimizer.optimizer.set_loss(self.loss)


def test_losses_are_those_of_a_loop_by_hand(tmp_path):
    """100 steps: Trainer and callback against the plain loop on the same batches, to the bit."""
    run = trainer(tmp_path, CruxyCallback(), steps=100, ours={}, gradient_accumulation_steps=1,
                  logging_strategy="no", lr_scheduler_type="constant", per_device_train_batch_size=64)  # fmt: skip
    run.train()
    model = tiny_model()
    decayed = run.get_decay_parameter_names(model)
    groups = [[p for n, p in model.named_parameters() if (n in decayed) is wanted] for wanted in (True, False)]
    optimizer = CruxyOptimizer([{"params": g, "weight_decay": 0.0} for g in groups], lr=3e-3)
    rows = torch.tensor([row["input_ids"] for row in ROWS])
    order = iter(run.get_train_dataloader())
    batch = next(order)["input_ids"]  # every row, in the order of one epoch; the loss does not depend on it
    assert sorted(batch.tolist()) == sorted(rows.tolist())
    for _ in range(100):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step(loss=loss)
        optimizer.zero_grad()
    theirs, ours = ([row["loss"] for row in o.history()] for o in (run.optimizer.optimizer, optimizer))
    assert theirs[-1] < 0.7 * theirs[0]
    assert theirs == pytest.approx(ours, rel=1e-4)


def test_what_would_be_wrong_is_said(tmp_path):
    args = arguments(tmp_path, 1)
    args.max_grad_norm = 1.0
    with pytest.warns(UserWarning, match=r"max_grad_norm=1\.0 before CruxyOptimizer sees them; set max_grad_norm=0\.0"):
        optimizer_cls_and_kwargs(args)
    run = trainer(tmp_path, None, steps=1)
    run.add_callback(CruxyCallback())
    with pytest.raises(RuntimeError, match=r"call CruxyCallback\(\.\.\.\)\.attach\(trainer\) before trainer\.train"):
        run.train()


def test_a_second_training_has_the_optimizer_of_its_own(tmp_path):
    callback = CruxyCallback(guard=Policy(act=False))
    run = trainer(tmp_path, callback, steps=3, ours={})
    run.train()
    first = run.optimizer.optimizer
    run.optimizer = run.lr_scheduler = None
    run.train()
    assert run.optimizer.optimizer is not first
    assert len(run.optimizer.optimizer.history()) == 3
    assert all(row["loss"] > 0 for row in run.optimizer.optimizer.history())


# -- the guard ----------------------------------------------------------------------------------


def test_a_poisoned_step_is_skipped_and_logged(tmp_path):
    callback = CruxyCallback(guard=True)
    run = trainer(tmp_path, callback, poisoned=[9])
    run.train()
    (event,) = [event for event in read_events(tmp_path / "guard_events.jsonl") if event.kind == "skip"]
    assert (event.step, event.batch, event.layer) == (10, "of step 10", "all 12 tensors")
    assert [entry["regime"] for entry in logged(run)][-1] in ("stable", "stressed", "recovering")
    assert all(math.isfinite(float(p.detach().abs().max())) for p in run.model.parameters())
    assert callback.guard is not None
    # The Trainer's own loss of the last log is the mean over its steps, the guard's the one of the last step.
    assert callback.guard.metrics["loss"] == pytest.approx(logged(run)[-1]["loss"], rel=0.2)


def test_checkpoints_are_sealed_and_resume_exactly(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 8, "save_total_limit": 3}
    whole = CruxyCallback(guard=True)
    first = trainer(tmp_path / "a", whole, poisoned=[5], **settings)
    first.train()
    folder = tmp_path / "a" / "checkpoint-16"
    assert files.damage(folder) is None
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 16
    resumed = CruxyCallback(guard=True)
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
    callback = CruxyCallback(Policy(max_rollbacks=0))
    run = trainer(tmp_path, callback, poisoned=range(6, 100), steps=60)
    run.train()
    assert run.state.global_step == 12  # five bad steps, read one step late
    assert callback.guard is not None
    assert callback.guard.stopped is not None
    assert "5 steps in a row were not finite" in callback.guard.stopped


def test_it_feeds_the_reporters(tmp_path):
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs or {}))

    run = trainer(tmp_path, None, steps=4, ours={})
    run.callback_handler.callbacks.insert(0, Reporter())
    CruxyCallback(guard=True).attach(run)
    run.train()
    assert {"regime", "phase", "lr_used"} <= set(seen[0])
