"""Training every weight: what is written is the model that was trained, whatever interrupts the run."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cruxy_triton.errors import UserError
from cruxy_triton.finetune import data, full, report, run
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe

from .test_finetune import QUICK, losses, metrics, record, stock_loss, wait_for_steps

WEIGHTS = Path("model") / "model.safetensors"
FULL = ("--method", "full", "--lr", "0.003")


@pytest.fixture
def train(tmp_path: Path, small_model, sums: Path) -> Callable[..., tuple[run.Result, list[str]]]:
    """train(**recipe) -> (result, the lines said), by default a few steps of all weights of a small Llama."""

    def go(*, resume: bool = False, **settings: Any) -> tuple[run.Result, list[str]]:
        said: list[str] = []
        folder = RunFolder(tmp_path / settings.pop("output", "run"), resume=resume)
        few = {
            "method": "full", "max_steps": 4, "batch_size": 2, "micro_batch_size": 2, "max_seq_length": 64, "lr": 3e-3,
            "max_eval_samples": 6, "save_steps": 2, "samples": 1, "sample_tokens": 4, "model": str(small_model()),
            "data": str(sums), "output": str(folder.path),
        }  # fmt: skip
        recipe = run.resume_recipe(folder, settings) if resume else Recipe(**{**few, **settings})
        return run.finetune(recipe, folder, run.Hooks(say=said.append)), said

    return go


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(20, 60)[None]).logits


def test_a_full_run_as_a_process(small_model, questions: Path, command, capsys) -> None:
    """What it promises is written; plain transformers has its loss from the result, and `generate` its answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cruxy_triton.cli import main

    words = ("finetune", small_model("qwen2"), "--data", questions, "--output", "run", *FULL, *QUICK)
    done = command(*words, "--sample-tokens", "8")
    assert done.returncode == 0, done.stderr
    folder = command.folder / "run"
    assert {p.name for p in folder.iterdir()} == {
        "model", "checkpoints", "events.jsonl", "memory.svg", "metrics.jsonl", "plot.png", "report.md", "run.json"
    }  # fmt: skip
    made = record(folder)
    result = made["result"]
    assert result["after"]["loss"] < result["before"]["loss"] - 0.5
    assert made["recipe"]["optimizer"] == "cruxy-lion"
    assert all(row["grad_norm"] > 0 for row in metrics(folder) if "loss" in row)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert made["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    found = data.load(str(questions), eval_source=None, eval_fraction=0.05, max_eval_samples=20, seed=0, chat=False)
    assert stock_loss(model, tokenizer, found.held_out, 128) == pytest.approx(result["after"]["loss"], rel=1e-5)
    said = (folder / "report.md").read_text(encoding="utf-8")
    assert f"| trained | every weight: {made['trainable_parameters']:,} parameters (float32) |" in said
    assert "LoRA" not in said
    assert "AutoModelForCausalLM.from_pretrained('model', dtype='auto')" in said

    sample = made["samples"][0]
    question = sample["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
    for name in ("run", "run/model"):
        capsys.readouterr()
        words = ("generate", command.folder / name, "--prompt", question, "--max-new-tokens", "8")
        assert main([str(word) for word in words]) == 0
        assert capsys.readouterr().out.strip() == sample["after"]
    assert main(["merge", str(folder)]) == 2
    assert "holds no adapter to merge" in capsys.readouterr().err


def test_killed_and_interrupted_it_is_bit_for_bit_the_uninterrupted_run(small_model, questions: Path, command) -> None:
    """Once by SIGKILL in the middle of a step, once by Ctrl-C; codes of 4 bits are rounded at random."""
    words = (
        "finetune", small_model(), "--data", questions, *FULL, "--state-bits", "4", "--max-steps", "30", "--batch-size",
        "2", "--max-seq-length", "96", "--max-eval-samples", "10", "--save-steps", "5", "--sample-tokens", "0",
    )  # fmt: skip
    whole = command(*words, "--output", "whole")
    assert whole.returncode == 0, whole.stderr
    broken = command.folder / "broken"
    process = command.start(*words, "--output", "broken")
    wait_for_steps(broken, 7, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert record(broken)["status"] == "running"
    process = command.start("finetune", "--resume", "--output", "broken")
    wait_for_steps(broken, 14, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "stopping: finishing this step" in output
    assert record(broken)["status"] == "interrupted"
    resumed = command("finetune", "--resume", "--output", "broken")
    assert resumed.returncode == 0, resumed.stderr
    assert len(record(broken)["resumed_at_steps"]) == 2
    assert losses(broken) == losses(command.folder / "whole")
    assert (broken / WEIGHTS).read_bytes() == (command.folder / "whole" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("gemma", True)])
def test_the_model_that_is_written_is_the_one_that_was_trained(
    architecture: str, tied: bool, train, small_model, tmp_path: Path, monkeypatch
) -> None:
    """From a base in shards, with a config for generating that transformers does not save where it was changed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(small_model(architecture))
    model.save_pretrained(base, max_shard_size="200KB")
    AutoTokenizer.from_pretrained(small_model(architecture)).save_pretrained(base)
    assert len(list(base.glob("model-*.safetensors"))) > 1
    generation = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**generation, "do_sample": False, "temperature": 0.7}))
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: owner/name\n---\n# Model\n")

    logits = []
    real = report.save
    monkeypatch.setattr(report, "save", lambda model, *rest: (logits.append(logits_of(model)), real(model, *rest)))
    train(model=str(base))
    folder = tmp_path / "run" / "model"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(loaded), logits[0])
    assert not torch.allclose(logits[0], logits_of(model), atol=0.1 * float(logits[0].abs().max()))
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    moved = [name for name, p in loaded.named_parameters() if not torch.equal(p, dict(model.named_parameters())[name])]
    assert moved == [name for name, _ in loaded.named_parameters()], "every weight learns"
    config = json.loads((folder / "config.json").read_text())
    assert (config.get("use_cache", True), config["dtype"]) == (True, "float32")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: owner/name\nlibrary_name: transformers\nlicense: apache-2.0\n---\n")
    assert "| optimizer | cruxy-lion |" in card
    assert "lora" not in card
    umask = os.umask(0)
    os.umask(umask)
    assert {oct(p.stat().st_mode & 0o777) for p in folder.iterdir()} == {oct(0o666 & ~umask)}


@pytest.mark.parametrize(("optimizer", "bits"), [("cruxy-lion", 4), ("cruxy-lion", 8), ("cruxy", 8), ("adamw", 32)])
def test_what_a_checkpoint_takes_is_known_before(optimizer: str, bits: int, train, tmp_path: Path) -> None:
    """By which the room on the disk is asked for: weights and state, to a few kilobytes of names and settings."""
    folder = tmp_path / "run"
    asked = []
    real = RunFolder.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "begin", lambda self, needed: (asked.append(needed), real(self, needed)))
        result, _ = train(optimizer=optimizer, state_bits=bits, max_steps=2)
    assert result.after["loss"] < result.before["loss"]
    checkpoint = folder / "checkpoints" / "checkpoint-2"
    weights, state = ((checkpoint / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    tensors = sum(t.nbytes for t in load_file(checkpoint / "model.safetensors").values())
    copies = run.COPIES_IN_CHECKPOINTS + run.COPIES_IN_SNAPSHOTS
    each = (asked[0] - tensors) / copies
    assert each == pytest.approx(weights + state, abs=40_000)
    assert abs(each - tensors) > 60_000, "the state is not lost among the names"


def test_the_guard_goes_back_where_copies_are_small_and_says_where_it_cannot(
    train, tmp_path: Path, monkeypatch
) -> None:
    import functools

    from cruxy_triton.finetune import train as train_module

    quick = functools.partial(train_module.Policy, snapshot_interval=5, snapshot_confirm=3, warmup_steps=5)
    monkeypatch.setattr(train_module, "Policy", quick)
    real = train_module.Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = real(self, *args, **kwargs)
        if self.state.global_step + 1 == 14:
            with torch.no_grad():
                next(iter(self.peft_model.parameters()))[0, 0] = math.nan
        return loss

    monkeypatch.setattr(train_module.Trainer, "training_step", training_step)
    result, said = train(output="small", max_steps=20, save_steps=10)
    assert math.isfinite(result.after["loss"])
    events = [json.loads(line) for line in (tmp_path / "small" / "events.jsonl").read_text().splitlines()]
    (rollback,) = [event for event in events if event["kind"] == "rollback"]
    assert "back to the weights after step 10" in rollback["message"]
    assert not [line for line in said if "keeps no snapshots" in line]

    monkeypatch.setattr(full, "LARGEST_SNAPSHOT", 100_000)
    with pytest.raises(run.TrainingFailed, match=r"no snapshot is kept.* Model and report are in"):
        train(output="large", max_steps=20, save_steps=10)
    assert not (tmp_path / "large" / "snapshots").exists()


def test_what_cannot_learn_is_refused(train, small_model, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(small_model(), base)
    config = json.loads((base / "config.json").read_text())
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    with pytest.raises(UserError, match="is kept in 4 bits, and 4-bit weights cannot learn; give the plain model"):
        train(model=str(base))
    assert not (tmp_path / "run").exists()
