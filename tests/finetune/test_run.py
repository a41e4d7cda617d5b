"""A run called as a library, on models of a few kilobytes: its result is right, or refused before it writes."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cruxy_triton.errors import UserError
from cruxy_triton.finetune import memory, run
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe

ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture
def train(tmp_path: Path, small_model, sums: Path) -> Callable[..., tuple[run.Result, list[str]]]:
    """train(**recipe) -> (result, the lines said), by default a few steps of a small Llama in tmp_path/run."""

    def go(*, resume: bool = False, overwrite: bool = False, **settings: Any) -> tuple[run.Result, list[str]]:
        said: list[str] = []
        folder = RunFolder(tmp_path / settings.pop("output", "run"), resume=resume, overwrite=overwrite)
        if resume:
            recipe = run.resume_recipe(folder, settings)
        else:
            few = {
                "max_steps": 4, "batch_size": 2, "micro_batch_size": 1, "max_seq_length": 64, "max_eval_samples": 6,
                "save_steps": 2, "sample_tokens": 4, "lr": 0.01, "lora_dropout": 0.1,
            }  # fmt: skip
            given = {"model": str(small_model()), "data": str(sums), "output": str(folder.path)}
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


@pytest.mark.parametrize("where", ["held_out", "generate", "save", "report"])
def test_an_interruption_after_the_last_step_adds_no_step(where: str, train, tmp_path: Path, monkeypatch) -> None:
    """Stopped in the final evaluation, the sample, the adapter or the report, and resumed: the uninterrupted run."""
    from cruxy_triton.finetune import report
    from cruxy_triton.finetune import train as train_module

    whole, _ = train(output="whole", lr_schedule="constant")
    owner, name = {
        "held_out": (train_module.Trainer, "held_out"),
        "generate": (train_module.Trainer, "generate"),
        "save": (report, "save"),
        "report": (report, "write"),
    }[where]
    real = getattr(owner, name)
    # The first evaluation and its samples precede training.
    stops = {"held_out": 2, "generate": len(record(tmp_path / "whole")["samples"]) + 1, "save": 1, "report": 1}
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
    architecture: str, train, small_model, sums: Path
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
    found = data.load(str(sums), eval_source=None, eval_fraction=0.05, max_eval_samples=6, seed=0)
    total, tokens = 0.0, 0
    rows, _ = data.fit(data.tokenize(found.held_out, AutoTokenizer.from_pretrained(folder)), 64)
    for row in rows:
        ids, labels = (torch.from_numpy(row[name]).long()[None] for name in ("input_ids", "labels"))
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


@pytest.mark.parametrize(
    ("architecture", "settings", "says"),
    [
        ("bert", {}, r"\(bert\) is no causal language model: what it says of a token changes with the tokens after it"),
        ("rwkv", {"load_in_4bit": True}, r"\(rwkv\) cannot be trained here in 4 bits: running four tokens"),
        ("mamba", {"target_modules": ["in_proj", "lm_head"]}, "unknown LoRA targets lm_head; .* in_proj, x_proj"),
        ("mamba", {"target_modules": ["out_proj"]}, "unknown LoRA targets out_proj; .* has in_proj, x_proj, dt_proj"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(
    architecture: str, settings: dict, says: str, train, small_model, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        train(model=str(small_model(architecture)), **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("architecture", ["mamba", "granitemoehybrid"])
def test_state_space_models_train(architecture: str, train, small_model) -> None:
    less = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_chunk_size": 16, "num_local_experts": 2}
    folder = small_model(architecture, num_hidden_layers=1, **(less if architecture != "mamba" else {}))
    result, said = train(model=str(folder), max_steps=2, lora_dropout=0.0, max_eval_samples=2)
    assert result.after["loss"] < result.before["loss"]
    assert ("router's auxiliary loss" in " ".join(said)) == (architecture == "granitemoehybrid")


def test_a_model_of_several_parts_is_refused(train, small_model, tmp_path: Path) -> None:
    """An adapter on a part for pictures would never see a gradient, and the plan is made for a text alone."""
    from transformers import Gemma3Config

    folder = tmp_path / "gemma3"
    shutil.copytree(small_model("gemma"), folder)
    Gemma3Config().save_pretrained(folder)
    with pytest.raises(UserError, match="'gemma3' is a model of several parts"):
        train(model=str(folder))
    assert [p.name for p in tmp_path.iterdir()] == ["gemma3"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_checkpoint_that_is_quantized_already(dtype: str, train, small_model, tmp_path: Path) -> None:
    """As bitsandbytes users publish them: the same run as with --load-in-4bit, up to the weights' rounding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantized = tmp_path / "llama-bnb-4bit"
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(small_model(), quantization_config=bits, device_map={"": "cpu"})
    model.save_pretrained(quantized)
    AutoTokenizer.from_pretrained(small_model()).save_pretrained(quantized)
    result, _ = train(model=str(quantized))
    expected, _ = train(load_in_4bit=True, double_quant=False, output="plain")
    found = record(tmp_path / "run")
    assert (found["recipe"]["load_in_4bit"], found["recipe"]["double_quant"]) == (True, False)
    assert found["weights"] == record(tmp_path / "plain")["weights"]
    assert result.after == pytest.approx(expected.after, rel=1e-6)

    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantized already, with gptq"):
        train(model=str(quantized), output="gptq")


def test_a_checkpoint_that_keeps_layers_out_of_its_4_bits(train, small_model, tmp_path: Path, monkeypatch) -> None:
    """Its weights take more than planned: that is said, and refused where it does not fit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    kept = ["lm_head", "down_proj", "q_proj"]
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=kept)
    model = AutoModelForCausalLM.from_pretrained(
        small_model(), dtype=torch.float32, quantization_config=bits, device_map={"": "cpu"}
    )
    folder = tmp_path / "llama-dynamic-bnb-4bit"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(small_model()).save_pretrained(folder)
    weights = sum(p.numel() for name, p in model.named_parameters() if "down_proj" in name or "q_proj" in name)
    beyond = weights * 4 - weights // 2
    settings = {"model": str(folder), "max_steps": 1, "gradient_checkpointing": True, "attention": "eager"}
    _, said = train(**settings)
    (note,) = [line for line in said if "keeps some of its linear layers out of its 4 bits" in line]
    assert f"{beyond / 2**20:,.1f} MiB more than planned" in note
    make_plan = memory.make_plan

    def with_room(room: int) -> Callable[..., Any]:  # a budget is 256 MiB or more, and this model takes 6
        def made(*given: Any) -> Any:
            plan = make_plan(*given)
            return replace(plan, usable_bytes=plan.peak_bytes + room)

        return made

    monkeypatch.setattr(memory, "make_plan", with_room(beyond - 1))
    with pytest.raises(UserError, match=r"out of its 4 bits.*give its unquantized original"):
        train(**settings, output="small")
    monkeypatch.setattr(memory, "make_plan", with_room(beyond))
    train(**settings, output="enough")


def test_a_sample_can_be_left_out_when_a_run_is_resumed(train, tmp_path: Path) -> None:
    train()
    saved = record(tmp_path / "run")
    del saved["result"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(saved | {"status": "interrupted"}))
    result, _ = train(resume=True, sample_tokens=0)
    assert result.finished
    assert result.samples == []


def stop_at(step: int, monkeypatch) -> None:
    """Lets SIGTERM come while `step` is computed."""
    from cruxy_triton.finetune import train as train_module

    real = train_module.Telemetry.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        real(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), 15)

    monkeypatch.setattr(train_module.Telemetry, "on_step_end", on_step_end)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(train, tmp_path: Path, monkeypatch) -> None:
    train(output="whole", max_steps=8)
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        stopped, said = train(output="broken", max_steps=8)
    assert (stopped.step, stopped.signal) == (5, 15)
    assert any(line.startswith("stopping: finishing this step") for line in said)
    optimizer = tmp_path / "broken" / "checkpoints" / "checkpoint-5" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    _, said = train(output="broken", resume=True)
    assert any("checkpoint-5 is damaged (optimizer.pt is not as it was written)" in line for line in said)
    assert record(tmp_path / "broken")["resumed_at_steps"] == [4]
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert (tmp_path / "broken" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_the_time_of_a_resumed_run_is_that_of_all_its_steps(train, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    slow = [json.loads(line) | ({"seconds": 1000.0} if '"seconds"' in line else {}) for line in lines]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in slow))
    train(resume=True)
    assert 3000 < record(tmp_path / "run")["result"]["seconds"] < 3100
    assert "in 300" in (tmp_path / "run" / "report.md").read_text()


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(train, tmp_path: Path, monkeypatch) -> None:
    """The kernel itself refuses to write more than a few kilobytes to a file, in the middle of a checkpoint."""
    resource = pytest.importorskip("resource", reason="limits on the size of a file exist on POSIX only")
    from cruxy_triton.finetune import train as train_module

    train(output="whole")
    real = train_module.Trainer._save_checkpoint
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self: Any, *args: Any) -> None:
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            real(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(train_module.Trainer, "_save_checkpoint", limited)
        with pytest.raises(run.TrainingFailed, match=r"checkpoints cannot be written \(.*MiB free\); make room and"):
            train()
    assert record(tmp_path / "run")["status"] == "failed"
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    train(resume=True)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_model_is_read_once(train, small_model, tmp_path: Path) -> None:
    """By the operating system's account of what is opened: a config, a tokenizer and weights have one reader each."""
    import sys

    model = tmp_path / "model"
    shutil.copytree(small_model(), model)
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    train(model=str(model))
    names = ("config.json", "tokenizer.json", "generation_config.json")
    assert {name: opened.count(str(model / name)) for name in names} == dict.fromkeys(names, 1)


def test_paths_are_kept_whole_and_the_adapter_can_be_published(train, small_model, sums, tmp_path, monkeypatch) -> None:
    model = tmp_path / "elsewhere" / "model"
    shutil.copytree(small_model(), model)
    (model / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: owner/name\ntags: [x]\n---\n# Model\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copy(sums, "sums.jsonl")
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        train(model="model", data="sums.jsonl")
    train(resume=True, model="./model")
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    assert (adapter / "README.md").read_text().startswith(
        "---\nbase_model: owner/name\nlibrary_name: peft\nlicense: apache-2.0\n---\n"
    )
    card = (adapter / "README.md").read_text()
    assert f"was the folder {model} of the machine it was trained on; by its card it is owner/name in another" in card
    result = record(tmp_path / "run")["result"]
    losses = f"| {result['before']['loss']:.4f} | {result['after']['loss']:.4f} |"
    for shown in (losses, "after 4 steps", "| lr | 0.01 |"):
        assert shown in card
    assert "sums.jsonl" in card
    assert str(tmp_path / "elsewhere" / "sums.jsonl") not in card
    umask = os.umask(0)
    os.umask(umask)
    assert {oct(p.stat().st_mode & 0o777) for p in adapter.iterdir()} == {oct(0o666 & ~umask)}


def test_code_that_comes_with_a_model_is_not_run_and_the_option_is_named(train, small_model, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mystery", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match=r"brings code of its own: read it, .* --trust-remote-code"):
        train(model=str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_another_model_is_refused(train, small_model, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(UserError, match="the model knows tokens below 100 only"):
        train(model=str(folder))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_schedule_is_transformers_own_but_for_a_first_step_that_trains(schedule: str) -> None:
    from transformers import get_scheduler

    from cruxy_triton.finetune.train import lr_factor

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    oracle = get_scheduler(name, optimizer=optimizer, num_warmup_steps=5, num_training_steps=40)
    expected = []
    for _ in range(41):
        expected.append(oracle.get_last_lr()[0])
        optimizer.step()
        oracle.step()
    found = [lr_factor(schedule, step, 5, 40) for step in range(41)]
    assert found[5:] == pytest.approx(expected[5:], abs=1e-12)
    assert found[:5] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])


def test_what_the_report_says_is_what_was_computed(train, tmp_path: Path) -> None:
    result, said = train(max_seq_length=32)
    found = record(tmp_path / "run")
    report = (tmp_path / "run" / "report.md").read_text()
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert found["result"]["tokens"] == sum(row["tokens"] for row in steps)
    assert all(0 <= row["accuracy"] <= 1 and 0 < row["tokens"] <= 2 * 32 for row in steps)
    assert found["result"]["epochs"] == pytest.approx(8 / found["records"]["sequences"])
    cut = found["records"]["cut"]
    assert cut > 0
    warning = f"{cut:,} of {found['records']['train']:,} training records are cut at 32 tokens"
    assert any(warning in line and line.startswith("warning") for line in said)
    for words in (
        f"{found['result']['epochs']:.2f} epochs", "tokens per second", warning,
        f"held out ({result.after['sequences']} sequences, {result.after['tokens']:,} tokens)",
        f"{found['records']['trained_tokens']:,} of them trained on",
    ):  # fmt: skip
        assert words in report, words


def test_what_a_length_and_a_budget_cost_is_said(train, tmp_path: Path) -> None:
    long, short = ({"prompt": "long " * n, "completion": " short"} for n in (700, 3))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [long, short, short, short] * 6))
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [long, long, short] * 2))
    files = {"data": str(tmp_path / "d.jsonl"), "eval_data": str(tmp_path / "e.jsonl")}
    result, said = train(**files, vram_bytes=1 << 30)
    assert "warning: 6 of 24 training records are left out: their prompt alone fills the 64 tokens" in said
    assert "warning: 4 of 6 held-out records are left out: their prompt alone fills the 64 tokens" in said
    assert "evaluating on 2 held-out sequences before training" in said
    assert result.before["sequences"] == 2
    assert any("on a CPU nothing keeps the process to it" in line for line in said)

    (tmp_path / "e.jsonl").write_text((json.dumps(long) + "\n") * 3)
    with pytest.raises(UserError, match="in any held-out record; give a larger one"):
        train(**files, output="other")
    with pytest.raises(UserError, match="in any held-out record; shorten the prompts, the model takes no more"):
        train(**files, output="other", max_seq_length=512)


@pytest.mark.parametrize("name", ["held_out", "training_step"])
def test_running_out_of_memory_is_a_sentence(name: str, train, tmp_path: Path, monkeypatch) -> None:
    from cruxy_triton.finetune import train as train_module

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(train_module.Trainer, name, full)
    when, how = ("before training", "again,") if name == "held_out" else ("at step 1", "again with --resume,")
    with pytest.raises(run.TrainingFailed, match=rf"out of memory {when} \(the plan said .*\): close other.*{how}"):
        train()
    assert (tmp_path / "run").exists() == (name == "training_step")
    if name == "training_step":
        assert record(tmp_path / "run")["status"] == "out of memory"


# -- the guard ---------------------------------------------------------------------------------------------------


def breaking(monkeypatch, steps: Any, what: str) -> None:
    """In each of `steps` (from 1) puts NaN into the gradient of the layer 0 adapter of v_proj, or into its weights."""
    from cruxy_triton.finetune import train as train_module

    real = train_module.Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = real(self, *args, **kwargs)
        if self.state.global_step + 1 in steps:
            name = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.default.weight"
            parameter = dict(self.peft_model.named_parameters())[name]
            with torch.no_grad():
                (parameter.grad if what == "gradient" else parameter)[0, 0] = math.nan
        return loss

    monkeypatch.setattr(train_module.Trainer, "training_step", training_step)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("optimizer", ["cruxy", "adamw"])
def test_a_guard_with_nothing_to_do_changes_nothing(optimizer: str, train, tmp_path: Path) -> None:
    for guard in ("off", "observe", "act"):
        train(output=guard, guard=guard, optimizer=optimizer, max_steps=25, lr=2e-3, save_steps=50)
    off = rows(tmp_path / "off")
    assert not (tmp_path / "off" / "events.jsonl").exists()
    for guard in ("observe", "act"):
        assert [event["kind"] for event in events(tmp_path / guard)] == ["regime"], "warming -> stable"
        found = rows(tmp_path / guard)
        assert [row["loss"] for row in found if "loss" in row] == [row["loss"] for row in off if "loss" in row]
        assert {row["regime"] for row in found if "loss" in row} == {"warming", "stable"}
        assert (tmp_path / guard / ADAPTER).read_bytes() == (tmp_path / "off" / ADAPTER).read_bytes()


def test_a_gradient_that_is_not_finite_costs_one_step_and_is_named(train, tmp_path: Path, monkeypatch) -> None:
    breaking(monkeypatch, [3], "gradient")
    result, said = train(max_steps=5, optimizer="adamw")
    assert math.isfinite(result.after["loss"])
    (skip,) = [event for event in events(tmp_path / "run") if event["kind"] == "skip"]
    assert skip["step"] == 3
    assert skip["layer"].endswith("layers.0.self_attn.v_proj.lora_B.default.weight")
    assert skip["batch"].startswith("'Question: What is ")
    assert [row.get("actions") for row in rows(tmp_path / "run") if "loss" in row] == [None, None, ["skip"], None, None]
    assert any(line.startswith("guard: 5 steps") and "1 x skip" in line for line in said)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| actions | 1 x skip |" in report
    assert f"[batch {skip['batch']}]" in report
    assert record(tmp_path / "run")["result"]["guard"]["actions"] == {"skip": 1}
    assert not (tmp_path / "run" / "snapshots").exists(), "of no use to a finished run"


@pytest.mark.parametrize(
    ("guard", "optimizer"), [("act", "adamw"), ("act", "cruxy"), ("observe", "cruxy"), ("off", "cruxy")]
)
def test_a_run_whose_steps_are_all_skipped_has_failed(guard, optimizer, train, tmp_path: Path, monkeypatch) -> None:
    breaking(monkeypatch, range(1, 99), "gradient")
    with pytest.raises(run.TrainingFailed, match=r"^3 of 3 steps were skipped, .* Adapter and report are in .*run$"):
        train(max_steps=3, guard=guard, optimizer=optimizer)
    found = record(tmp_path / "run")
    assert (found["status"], found["result"]["after"]) == ("stopped", found["before"])
    assert f"**{found['stopped']}**" in (tmp_path / "run" / "report.md").read_text()


def test_a_run_that_nothing_helps_is_stopped_with_good_weights(train, tmp_path: Path, monkeypatch) -> None:
    breaking(monkeypatch, range(3, 99), "gradient")
    says = r"^training stopped at step 32: 5 steps in a row were not finite, .* The weights are those after step 0\."
    with pytest.raises(run.TrainingFailed, match=says):
        train(max_steps=60)
    found = record(tmp_path / "run")
    assert found["status"] == "stopped"
    assert found["result"]["after"] == found["before"]
    weights = load_file(tmp_path / "run" / ADAPTER)
    assert all(not w.any() for name, w in weights.items() if "lora_B" in name), "as they were before the first step"
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"**{found['stopped']}**" in report
    before = events(tmp_path / "run")
    assert [e["kind"] for e in before if e["kind"] in ("rollback", "stop")] == ["rollback"] * 5 + ["stop"]
    with pytest.raises(run.TrainingFailed, match=says):
        train(resume=True)
    assert record(tmp_path / "run")["resumed_at_steps"] == [30]
    assert events(tmp_path / "run") == before


def test_a_resumed_run_rolls_back_to_where_the_whole_one_does(train, tmp_path: Path, monkeypatch) -> None:
    """To weights from before the interruption, which lie on the disk; history, events and result are the same."""
    import functools

    from cruxy_triton.finetune import train as train_module

    quick = functools.partial(train_module.Policy, snapshot_interval=5, snapshot_confirm=3, warmup_steps=5)
    monkeypatch.setattr(train_module, "Policy", quick)
    breaking(monkeypatch, [14], "weights")
    train(output="whole", max_steps=20, save_steps=6)
    with monkeypatch.context() as patch:
        stop_at(12, patch)
        train(output="broken", max_steps=20, save_steps=6)
    train(output="broken", resume=True)
    (rollback,) = [event for event in events(tmp_path / "whole") if event["kind"] == "rollback"]
    assert "back to the weights after step 10" in rollback["message"]
    assert events(tmp_path / "broken") == events(tmp_path / "whole")
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert (tmp_path / "broken" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    ("optimizer", "layerwise", "more"),
    [
        ("cruxy", "blade", {"loraplus_lr_ratio": 4.0}),
        ("adamw", "sketch_align", {}),
        ("sgd", "blade", {"chunked_loss": False}),
    ],
)
def test_layerwise(optimizer: str, layerwise: str, more: dict, train, tmp_path: Path, monkeypatch, recwarn) -> None:
    """Multipliers by layer in the metrics; a run that is resumed ends in the same bits; entropy is TRL's own."""
    settings = {"optimizer": optimizer, "layerwise": layerwise, "max_steps": 6, "guard": "off", **more}
    train(output="whole", **settings)
    entropy = [str(w.message) for w in recwarn if "gets no output entropy" in str(w.message)]
    assert bool(entropy) == (more.get("chunked_loss") is False)
    found = [row["multipliers"] for row in rows(tmp_path / "whole") if "loss" in row]
    assert [list(row) for row in found] == [["model.layers.0", "model.layers.1"]] * 6
    assert set(found[0].values()) == {1.0}
    assert all(0.3 - 1e-6 <= m <= 1.7 + 1e-6 for row in found for m in row.values())
    assert len(set(found[3].values())) == (1 if layerwise == "sketch_align" else 2)
    assert any(m != 1 for m in found[3].values())
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        train(output="part", **settings)
    train(output="part", resume=True)
    assert [row["multipliers"] for row in rows(tmp_path / "part") if "loss" in row] == found
    one, other = (load_file(tmp_path / name / ADAPTER) for name in ("whole", "part"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_clipping_is_what_is_asked_for(train, tmp_path: Path) -> None:
    """sgd's first step moves B, which begins at zero, by the learning rate times the gradient."""
    lengths = {}
    for clip in ("global", "none"):
        train(
            output=clip, clip=clip, guard="observe", optimizer="sgd", lr=0.5, lr_schedule="constant", lora_alpha=500,
            max_steps=1,
        )  # fmt: skip
        weights = load_file(tmp_path / clip / ADAPTER)
        lengths[clip] = torch.stack([w.norm() for name, w in weights.items() if "lora_B" in name]).norm().item()
        (row,) = [row for row in rows(tmp_path / clip) if "loss" in row]
        assert row["grad_norm"] > 2
    assert lengths["global"] == pytest.approx(0.5, rel=1e-5)
    assert lengths["none"] == pytest.approx(0.5 * row["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "cruxy"])
def test_who_clips_each_tensor(optimizer: str, train, tmp_path: Path, monkeypatch) -> None:
    from cruxy_triton.finetune import train as train_module

    made = []
    real = train_module.make_guard
    monkeypatch.setattr(train_module, "make_guard", lambda *args: made.append(real(*args)) or made[-1])
    train(clip="tensor", optimizer=optimizer, max_steps=2)
    assert made[0].policy.tensor_ratio == (1.05 if optimizer == "adamw" else None)
    assert getattr(made[0].optimizer, "clip", "tensor") == "tensor"
    with pytest.raises(UserError, match=r"--clip tensor with --optimizer sgd is done by the guard"):
        Recipe("m", "d", "o", clip="tensor", optimizer="sgd", guard="observe")


def test_the_plot_has_the_regimes_and_the_actions(tmp_path: Path, monkeypatch) -> None:
    from matplotlib import pyplot

    from cruxy_triton.finetune import report

    regimes = ["warming"] * 3 + ["stable"] * 2 + ["unstable"] * 2 + ["recovering"]
    shown = [{"step": i, "loss": 5.0 - i, "lr": 1e-3, "regime": regime} for i, regime in enumerate(regimes, 1)]
    shown[5] |= {"loss": None, "actions": ["skip"]}
    shown[6] |= {"actions": ["skip", "rollback"]}
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    report.plot([{"step": 0, "eval_loss": 5.0}, *shown], tmp_path / "plot.png", "title")
    axes = kept[0].axes
    for axis in axes:
        spans = [(p.get_x(), p.get_x() + p.get_width()) for p in axis.patches]
        assert spans == [(0.5, 3.5), (3.5, 5.5), (5.5, 7.5), (7.5, 8.5)]
    marks = {line.get_label(): line.get_xydata().tolist() for line in axes[0].lines}
    assert (marks["skip"], marks["rollback"]) == ([[6.0, 0.0], [7.0, -2.0]], [[7.0, -2.0]])
    named = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert {"warming", "unstable", "recovering", "skip", "rollback"} <= set(named)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_rows_go_to_tensorboard_too(train, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(report_to="tensorboard")
    seen = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    written = rows(tmp_path / "run")
    for name, key in (("train/loss", "loss"), ("train/phase", "phase"), ("eval/loss", "eval_loss")):
        expected = [(row["step"], row[key]) for row in written if key in row]
        assert len(expected) >= 2
        found = [(event.step, event.value) for event in seen.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in expected], name
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-6)
    checkpoint = max((tmp_path / "run" / "checkpoints").iterdir())
    assert json.loads((checkpoint / "trainer_state.json").read_text())["log_history"] == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_reporter_that_is_not_installed_is_refused(name: str, train, tmp_path: Path, monkeypatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == name else real(n, *rest))
    with pytest.raises(UserError, match=f"--report-to {name} needs the package {name}, .* pip install {name}"):
        train(report_to=name)
    assert list(tmp_path.iterdir()) == []
