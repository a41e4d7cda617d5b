"""A run whose memory runs out: explained, and made again in less, with the same steps."""

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cruxy_triton.errors import UserError
from cruxy_triton.finetune import memory, retry, run
from cruxy_triton.finetune import train as train_module
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe
from cruxy_triton.planner import Card

ADAPTER = Path("adapter") / "adapter_model.safetensors"
FEW = {
    "max_steps": 4, "batch_size": 4, "micro_batch_size": 4, "max_seq_length": 64, "max_eval_samples": 6,
    "save_steps": 2, "sample_tokens": 4, "lr": 0.01, "gradient_checkpointing": False, "chunked_loss": True,
}  # fmt: skip


@pytest.fixture
def train(tmp_path: Path, small_model, sums: Path) -> Callable[..., tuple[run.Result, list[str]]]:
    """train(**recipe) -> (result, the lines said), by default four steps of a small Llama in tmp_path/run."""

    def go(*, overwrite: bool = False, resume: bool = False, **settings: Any) -> tuple[run.Result, list[str]]:
        said: list[str] = []
        folder = RunFolder(tmp_path / settings.pop("output", "run"), overwrite=overwrite, resume=resume)
        given = {"model": str(small_model()), "data": str(sums), "output": str(folder.path)}
        recipe = run.resume_recipe(folder, settings) if resume else Recipe(**{**given, **FEW, **settings})
        return run.finetune(recipe, folder, run.Hooks(say=said.append)), said

    return go


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for line in lines if "loss" in (row := json.loads(line))]


def fits(monkeypatch, most: int, *, from_step: int = 1, where: str = "training_step") -> list[Any]:
    """A card that has room for `most` sequences at once, from a step on; returns weak references to the models."""
    real = getattr(train_module.Trainer, where)
    seen: list[Any] = []

    def limited(self: Any, *args: Any) -> Any:
        if all(known() is not self.peft_model for known in seen):
            seen.append(weakref.ref(self.peft_model))
        size = args[1]["input_ids"].shape[0] if where == "training_step" else self.args.per_device_eval_batch_size
        if size > most and self.state.global_step + 1 >= from_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity")
        return real(self, *args)

    monkeypatch.setattr(train_module.Trainer, where, limited)
    return seen


def test_the_same_steps_in_less_memory(train, tmp_path: Path, monkeypatch) -> None:
    """Memory for one sequence at a time from step 4 on: half of the micro-batch is tried, and half of that."""
    train(output="whole")
    models = fits(monkeypatch, 1, from_step=4)
    result, said = train()
    assert (result.finished, result.step) == (True, 4)
    found, whole = record(tmp_path / "run"), record(tmp_path / "whole")
    changed = {n for n, value in found["recipe"].items() if value != whole["recipe"][n]} - {"output"}
    assert changed == {"micro_batch_size"}
    assert found["recipe"]["micro_batch_size"] == found["plan"]["config"]["micro_batch_size"] == 1
    assert found["resumed_at_steps"] == [2, 2], "from the last checkpoint, each time"
    first, second = found["out_of_memory"]
    assert first.startswith("out of memory at step 4 (the plan said ")
    assert "MiB; the process, interpreter and libraries included, took " in first
    assert "when 20.00 MiB more were asked for)" in first
    assert "trying again with 2 micro-batches of 2 instead of 1 of 4: 4 sequences of at most 64 tokens" in first
    assert "4 micro-batches of 1 instead of 2 of 2: 4 sequences" in second
    assert [line for line in said if line.startswith("warning: out of memory")] == [
        f"warning: {first}", f"warning: {second}"
    ]  # fmt: skip
    assert f"- {second}" in (tmp_path / "run" / "report.md").read_text()

    ours, theirs = steps(tmp_path / "run"), steps(tmp_path / "whole")
    assert [row["step"] for row in ours] == [1, 2, 3, 4]
    # The same sequences in each optimizer step, whatever the micro-batch.
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]
    assert [row["loss"] for row in ours[:2]] == [row["loss"] for row in theirs[:2]], "kept from before"
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)
    weights, expected = load_file(tmp_path / "run" / ADAPTER), load_file(tmp_path / "whole" / ADAPTER)
    for name, weight in weights.items():
        assert torch.allclose(weight, expected[name], rtol=1e-2, atol=1e-4), name
    gc.collect()
    assert len(models) == 3
    assert [known() for known in models[:2]] == [None, None], "what did not fit must not stay in memory"


def test_what_an_attempt_held_is_let_go_before_the_next(train, monkeypatch) -> None:
    models = fits(monkeypatch, 1, from_step=1)
    alive: list[int] = []
    real = retry.following

    def following(attempt: retry.Attempt) -> Any:
        alive.append(sum(known() is not None for known in models))
        return real(attempt)

    monkeypatch.setattr(retry, "following", following)
    train(max_steps=1)
    assert alive == [0, 0]


def test_before_anything_is_written(train, tmp_path: Path, monkeypatch) -> None:
    """The first evaluation already needs too much, with an earlier run still in place."""
    train()
    earlier = (tmp_path / "run" / ADAPTER).read_bytes()
    fits(monkeypatch, 2, where="held_out")
    stood: list[bool] = []
    real = retry.following
    monkeypatch.setattr(
        retry, "following", lambda a: stood.append((tmp_path / "run" / ADAPTER).read_bytes() == earlier) or real(a)
    )
    result, said = train(overwrite=True)
    assert result.finished
    assert stood == [True]
    found = record(tmp_path / "run")
    assert found["recipe"]["micro_batch_size"] == 2
    assert found["out_of_memory"][0].startswith("out of memory before training")
    assert "resumed_at_steps" not in found
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert sum(line.startswith("plan: ") for line in said) == 2, "each attempt says its plan"


def test_a_run_that_replaces_another_keeps_it_until_it_is_finished(train, tmp_path: Path, monkeypatch) -> None:
    train()
    earlier = (tmp_path / "run" / ADAPTER).read_bytes()
    fits(monkeypatch, 2)
    kept: list[bool] = []
    real = retry.following
    place = tmp_path / "run.previous" / ADAPTER
    monkeypatch.setattr(retry, "following", lambda a: kept.append(place.read_bytes() == earlier) or real(a))
    train(overwrite=True, seed=1)
    assert kept == [True]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_no_retry(train, tmp_path: Path, monkeypatch) -> None:
    fits(monkeypatch, 2, from_step=3)
    with pytest.raises(run.TrainingFailed, match=r"out of memory at step 3 .*with --resume, .* without --no-retry it"):
        train(retry=False)
    assert record(tmp_path / "run")["status"] == "out of memory"
    with pytest.raises(UserError, match="lora_r = 16, but 8 is given"):
        train(resume=True, lora_r=8)
    with pytest.raises(UserError, match="--batch-size 4 is not a multiple of --micro-batch-size 3"):
        train(resume=True, micro_batch_size=3)
    result, _ = train(resume=True, micro_batch_size=2)
    assert (result.finished, result.step) == (True, 4)
    assert record(tmp_path / "run")["resumed_at_steps"] == [2]


def test_to_the_end_of_what_can_be_tried(train, tmp_path: Path, monkeypatch) -> None:
    fits(monkeypatch, 0)
    real = retry.following

    def following(attempt: retry.Attempt) -> Any:
        attempt.plan = attempt.plan.__class__(**{**vars(attempt.plan), "peak_bytes": 1 << 40})
        return real(attempt)

    monkeypatch.setattr(retry, "following", following)
    with pytest.raises(run.TrainingFailed, match=r"out of memory at step 1 .*: close other programs .* --load-in-4bit"):
        train(chunked_loss=False, attention="eager")
    found = record(tmp_path / "run")
    assert [line.rpartition("trying again with ")[2].partition(":")[0] for line in found["out_of_memory"]] == [
        "2 micro-batches of 2 instead of 1 of 4", "4 micro-batches of 1 instead of 2 of 2",
        "gradient checkpointing", "the loss in tiles", "sdpa-cpu attention",
    ]  # fmt: skip
    assert found["status"] == "out of memory"


@pytest.mark.parametrize("batch", [1, 6, 7, 12])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("card", [Card.cpu("8GiB"), Card.budget("4GiB"), Card.budget("4GiB", (8, 6))])
def test_the_ladder_changes_nothing_that_a_step_computes(batch: int, checkpointing: bool, card: Card) -> None:
    start = Recipe(
        "m", "d", "o", batch_size=batch, micro_batch_size=batch, max_seq_length=64,
        gradient_checkpointing=checkpointing, chunked_loss=False, attention="eager",
    )  # fmt: skip
    found = [recipe for recipe, _ in retry.leaner(start, card)]
    free = {"micro_batch_size", "gradient_checkpointing", "chunked_loss", "attention"}
    assert {n for recipe in found for n, value in vars(recipe).items() if value != getattr(start, n)} <= free
    sizes = [start.micro_batch_size, *(recipe.micro_batch_size for recipe in found)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1
    assert all(recipe.micro_batch_size * recipe.gradient_accumulation_steps == batch for recipe in found)
    last = found[-1]
    assert (last.gradient_checkpointing, last.chunked_loss) == (True, True)
    assert last.attention == card.attention_kinds[0]


def test_a_released_step_is_not_divided() -> None:
    """With gradients released layer by layer a micro-batch is a step of its own."""
    full = {"method": "full", "batch_size": 4, "micro_batch_size": 4, "gradient_checkpointing": False}
    start = Recipe(model="m", data="d", output="o", max_seq_length=64, attention="math", **full)
    assert start.releases
    found = [recipe for recipe, _ in retry.leaner(start, Card.cpu("8GiB"))]
    assert found
    assert all((r.batch_size, r.micro_batch_size, r.releases) == (4, 4, True) for r in found)


def test_a_configuration_that_the_planner_finds_too_large_is_passed_over(small_model, monkeypatch) -> None:
    """What is free decides too: a third of the plan's peak is, so that no first halving will do."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(small_model())
    recipe = Recipe("m", "d", "o", **{**FEW, "batch_size": 16, "micro_batch_size": 16, "max_seq_length": 512},
                    attention="sdpa-cpu")  # fmt: skip
    plan = memory.planned(recipe, config, Card.cpu("8GiB"), torch.float32)
    attempt = retry.Attempt(recipe, config, plan, torch.device("cpu"), torch.float32, False)

    def free(amount: int) -> None:
        monkeypatch.setattr(memory, "card_of", lambda *given: replace(Card.cpu("8GiB"), usable={"any": amount}))

    free(plan.peak_bytes // 3)
    following, how = retry.following(attempt)
    assert following.micro_batch_size in (2, 4)
    peaks = [memory.planned(r, config, Card.cpu("8GiB"), torch.float32).peak_bytes
             for r, _ in retry.leaner(recipe, Card.cpu("8GiB"))]  # fmt: skip
    chosen = next(peak for peak in peaks if peak <= plan.peak_bytes // 3)
    assert f"in {chosen / 2**20:,.0f} MiB by the plan" in how
    free(1 << 20)
    assert retry.following(attempt) is None


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as real:  # 4 EiB
        torch.empty(1 << 60, dtype=torch.float32)
    assert memory.ran_out(real.value)
    assert retry._asked(real.value) == f", when {1 << 62} bytes more were asked for"
    assert memory.ran_out(MemoryError())
    assert memory.ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not memory.ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not memory.ran_out(ValueError("can't allocate memory"))


SMALL_CARD = """
import sys, torch
from cruxy_triton.finetune import train
real = train.Trainer.training_step

def training_step(self, model, inputs, *args):
    if inputs["input_ids"].shape[0] > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    return real(self, model, inputs, *args)

train.Trainer.training_step = training_step
from cruxy_triton.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("words", [[], ["--no-retry"]], ids=["retry", "no retry"])
def test_as_a_process(words: list[str], small_model, sums: Path, command) -> None:
    options = ["--max-steps", "2", "--batch-size", "2", "--micro-batch-size", "2", "--max-seq-length", "64"]
    done = subprocess.run(
        [sys.executable, "-c", SMALL_CARD, "finetune", small_model(), "--data", sums, "--output", "run", *options,
         "--max-eval-samples", "4", "--samples", "0", *words],
        cwd=command.folder, env=command.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    if words:
        assert done.returncode == 1
        assert len(errors) == 1
        assert "error: out of memory at step 1 (the plan said " in errors[0]
    else:
        assert done.returncode == 0, done.stderr
        assert errors == []
        assert "warning: out of memory at step 1 (the plan said" in done.stdout
        assert "trying again with 2 micro-batches of 1 instead of 1 of 2: 2 sequences" in done.stdout
