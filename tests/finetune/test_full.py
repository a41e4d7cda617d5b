"""Training every weight: what is written is the model that was trained, whatever interrupts the run."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cruxy_triton.errors import UserError
from cruxy_triton.finetune import full, report, run
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe

WEIGHTS = Path("model") / "model.safetensors"

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


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(20, 60)[None]).logits


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
    (rollback,) = [event for event in events(tmp_path / "small") if event["kind"] == "rollback"]
    assert "back to the weights after step 10" in rollback["message"]
    assert not [line for line in said if "keeps no snapshots" in line]

    monkeypatch.setattr(full, "LARGEST_SNAPSHOT", 100_000)
    with pytest.raises(run.TrainingFailed, match=r"no snapshot is kept.* Model and report are in"):
        train(output="large", max_steps=20, save_steps=10)
    assert not (tmp_path / "large" / "snapshots").exists()


def broken_gradient(monkeypatch, steps: set[int], name: str) -> None:
    """In `steps` (from 1) puts NaN into the gradient of the parameter `name`, when autograd makes it."""
    from cruxy_triton.finetune import train as train_module

    real = train_module.Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        parameter = dict(self.peft_model.named_parameters())[name]
        hook = parameter.register_hook(lambda grad: grad * math.nan) if self.state.global_step + 1 in steps else None
        loss = real(self, *args, **kwargs)
        if hook is not None:
            hook.remove()
        return loss

    monkeypatch.setattr(train_module.Trainer, "training_step", training_step)


def test_a_layer_whose_gradient_is_not_finite_is_left_alone_and_named(train, tmp_path: Path, monkeypatch) -> None:
    """Released layer by layer: the others have learned by then, and the run goes on."""
    name = "model.layers.0.self_attn.v_proj.weight"
    broken_gradient(monkeypatch, {3}, name)
    result, said = train(max_steps=6)
    assert result.after["loss"] < result.before["loss"]
    (skip,) = [event for event in events(tmp_path / "run") if event["kind"] == "skip"]
    assert skip["step"] == 3
    assert skip["layer"].startswith("model.layers.0.")
    taken = rows(tmp_path / "run")
    assert [row["skipped"] for row in taken] == [0, 0, 1, 0, 0, 0]
    assert all(math.isfinite(row["loss"]) for row in taken)
    assert any(line.startswith("guard: 6 steps") and "1 x skip" in line for line in said)


def test_float16_weights_have_a_loss_scale(train, tmp_path: Path, monkeypatch) -> None:
    """As on a card without bfloat16: an overflow halves the scale, costs one step and is no fault of the run."""
    from cruxy_triton import settings
    from cruxy_triton.finetune import load

    for module in (settings, load):
        monkeypatch.setattr(module, "resolve_dtype", lambda *args: "float16")
    broken_gradient(monkeypatch, {2}, "model.layers.1.mlp.up_proj.weight")
    result, _ = train(max_steps=6, state_bits=4)
    assert result.after["loss"] < result.before["loss"] - 0.1
    taken = rows(tmp_path / "run")
    assert [row["loss_scale"] for row in taken] == [65536] + [32768] * 5
    assert [row["skipped"] for row in taken] == [0, 1, 0, 0, 0, 0]
    assert all(0 < row["grad_norm"] < 100 for row in taken), "unscaled"
    assert [event["kind"] for event in events(tmp_path / "run")] == ["overflow"]
    weights = load_file(tmp_path / "run" / WEIGHTS)
    assert {w.dtype for w in weights.values()} == {torch.float16}
    assert all(bool(w.isfinite().all()) for w in weights.values())


def test_released_and_whole_gradients_teach_the_same(train, tmp_path: Path) -> None:
    """The laws see a step's statistics one step later, and nothing else differs; only whole ones can be recorded."""
    losses_after = {}
    for name, release in (("released", True), ("whole", False)):
        result, _ = train(output=name, release=release, max_steps=12, sample_tokens=0, mode="stability_v1")
        losses_after[name] = result.after["loss"]
        assert result.after["loss"] < result.before["loss"] - 0.3
    assert losses_after["released"] == pytest.approx(losses_after["whole"], rel=0.02)
    said = (tmp_path / "released" / "report.md").read_text()
    assert "parameters (float32), each layer in the backward pass |" in said


def test_the_batch_is_what_fits_in_one_backward_pass(train, tmp_path: Path) -> None:
    train(batch_size=None, micro_batch_size=None, max_steps=1, samples=0)
    recipe = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert (recipe["release"], recipe["batch_size"], recipe["micro_batch_size"]) == (True, 8, 8)
    recipe = Recipe("m", "d", "o", method="full", batch_size=4, micro_batch_size=2)
    assert not recipe.release, "their gradients have to wait for each other"


def test_what_cannot_learn_is_refused(train, small_model, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(small_model(), base)
    config = json.loads((base / "config.json").read_text())
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    with pytest.raises(UserError, match="is kept in 4 bits, and 4-bit weights cannot learn; give the plain model"):
        train(model=str(base))
    assert not (tmp_path / "run").exists()
