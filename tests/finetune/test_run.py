"""A run called as a library, on models of a few kilobytes: its result is right, or refused before it writes."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cruxy_triton.errors import UserError
from cruxy_triton.finetune import run
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe

ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture
def train(tmp_path: Path, small_model, questions: Path) -> Callable[..., tuple[run.Result, list[str]]]:
    """train(**recipe) -> (result, the lines said), by default a few steps of a small Llama in tmp_path/run."""

    def go(*, resume: bool = False, overwrite: bool = False, **settings: Any) -> tuple[run.Result, list[str]]:
        said: list[str] = []
        folder = RunFolder(tmp_path / settings.pop("output", "run"), resume=resume, overwrite=overwrite)
        if resume:
            recipe = run.resume_recipe(folder, settings)
        else:
            few = {
                "max_steps": 4, "batch_size": 2, "micro_batch_size": 1, "max_seq_length": 96, "max_eval_samples": 6,
                "save_steps": 2, "sample_tokens": 4, "lr": 0.01, "lora_dropout": 0.1,
            }  # fmt: skip
            given = {"model": str(small_model()), "data": str(questions), "output": str(folder.path)}
            recipe = Recipe(**{**given, **few, **settings})
        return run.finetune(recipe, folder, run.Hooks(say=said.append)), said

    return go


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def copy_of(model: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None] = lambda w: None) -> Path:
    shutil.copytree(model, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("where", ["held_out", "generate", "save_adapter", "report"])
def test_an_interruption_after_the_last_step_adds_no_step(where: str, train, tmp_path: Path, monkeypatch) -> None:
    """Stopped in the final evaluation, the sample, the adapter or the report, and resumed: the uninterrupted run."""
    from cruxy_triton.finetune import report
    from cruxy_triton.finetune import train as train_module

    whole, _ = train(output="whole", lr_schedule="constant")
    owner, name = {
        "held_out": (train_module.Trainer, "held_out"),
        "generate": (train_module.Trainer, "generate"),
        "save_adapter": (report, "save_adapter"),
        "report": (report, "write"),
    }[where]
    real = getattr(owner, name)
    stops = {"held_out": 2, "generate": 2, "save_adapter": 1, "report": 1}  # the first evaluation precedes training
    calls = 0

    def stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stops[where]:
            os.kill(os.getpid(), 15)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        stopped, _ = train(output="broken", lr_schedule="constant")
    assert (stopped.finished, stopped.step, stopped.signal) == (False, 4, 15)
    assert record(tmp_path / "broken")["status"] == "interrupted"
    resumed, _ = train(output="broken", resume=True)
    assert (resumed.finished, resumed.step, resumed.after) == (True, 4, whole.after)
    assert (tmp_path / "broken" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    with pytest.raises(UserError, match="is finished"):
        train(output="broken", resume=True)


def test_missing_and_misshapen_weights_are_named(train, small_model, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    missing = copy_of(small_model(), tmp_path / "missing", lambda w: w.pop(name))
    misshapen = copy_of(small_model(), tmp_path / "misshapen", lambda w: w.update({name: torch.zeros(3, 5)}))
    with pytest.raises(UserError, match=f"1 weights of .*missing cannot be used: {name} is missing"):
        train(model=str(missing))
    with pytest.raises(UserError, match=rf"{name} has shape \[3, 5\] instead of \[128, 64\]"):
        train(model=str(misshapen))
    (missing / "model.safetensors").write_bytes((misshapen / "model.safetensors").read_bytes()[:20000])
    with pytest.raises(UserError, match=r"missing/model\.safetensors is damaged or cut off"):
        train(model=str(missing))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_a_mixture_of_experts_trains_and_its_held_out_loss_is_the_language_models(
    architecture: str, train, small_model, questions: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cruxy_triton.finetune import data

    folder = small_model(architecture)
    if architecture == "mixtral":
        with pytest.raises(UserError, match=r"--lora-dropout 0\.1 cannot be had"):
            train(model=str(folder))
    result, said = train(model=str(folder), max_steps=2, lora_dropout=0.0)
    assert result.finished
    assert not [line for line in said if "auxiliary" in line]
    # The oracle is the plain model's own loss, which has no auxiliary part unless it is asked for.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = data.load(str(questions), eval_source=None, eval_fraction=0.05, max_eval_samples=6, seed=0)
    total, tokens = 0.0, 0
    rows, _ = data.fit(data.tokenize(found.held_out, AutoTokenizer.from_pretrained(folder)), 96)
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * count
        tokens += count
    assert result.before["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_a_refusal_leaves_an_earlier_run_as_it_was(train, tmp_path: Path, monkeypatch) -> None:
    """Whatever refuses, and be it the last thing before training: the folder is untouched, with and without one."""
    from cruxy_triton.finetune import train as train_module

    train()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    monkeypatch.setattr(train_module.Trainer, "held_out", lambda self: {"loss": math.nan})
    with pytest.raises(UserError, match="before any training"):
        train(overwrite=True)
    with pytest.raises(UserError, match="before any training"):
        train(output="new")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_earlier_run_stays_in_sight_until_the_new_one_is_finished(train, tmp_path: Path, monkeypatch) -> None:
    from cruxy_triton.finetune import train as train_module

    train()
    adapter = (tmp_path / "run" / ADAPTER).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(train_module.Trainer, "training_step", lambda *args: (_ for _ in ()).throw(ArithmeticError))
        with pytest.raises(ArithmeticError):
            train(overwrite=True)
    assert record(tmp_path / "run")["status"] == "failed"
    assert (tmp_path / "run.previous" / ADAPTER).read_bytes() == adapter
    train(resume=True)
    assert record(tmp_path / "run")["status"] == "finished"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("architecture", ["falcon", "mixtral"])
def test_four_bits_that_are_none_are_refused(architecture: str, train, small_model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"only \d+% of the [\d,]+ weights .* would be in 4 bits"):
        train(model=str(small_model(architecture)), load_in_4bit=True)
    assert not (tmp_path / "run").exists()


def test_four_bits_are_counted(train, small_model, tmp_path: Path) -> None:
    _, said = train(load_in_4bit=True, max_steps=1)
    config = json.loads((small_model() / "config.json").read_text())
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    grouped = hidden * config["num_key_value_heads"] // heads
    linear = config["num_hidden_layers"] * (2 * hidden * hidden + 2 * hidden * grouped + 3 * hidden * inner)
    total = linear + 2 * config["vocab_size"] * hidden + (2 * config["num_hidden_layers"] + 1) * hidden
    assert record(tmp_path / "run")["weights"] == {"total": total, "quantized": linear}
    assert any(f"{total:,} weights, {linear / total:.0%} of them in 4 bits" in line for line in said)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_several_processes_are_refused(name: str, train, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match=f"one of 2 processes \\({name} is set\\)"):
        train()
    assert list(tmp_path.iterdir()) == []
