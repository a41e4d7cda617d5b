"""`cruxy-triton finetune` run as a process on small real models: what it writes, and that it can be trusted."""

import json
import math
import signal
import time
from pathlib import Path

import pytest
import torch

from cruxy_triton.finetune import data

QUICK = ("--max-steps", "12", "--batch-size", "4", "--max-seq-length", "128", "--max-eval-samples", "20")


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(folder) if "loss" in row]


def stock_loss(model: torch.nn.Module, tokenizer, records: list[dict], max_length: int) -> float:
    """Token-weighted loss of the completions by transformers' own loss: independent of TRL and of the package."""
    total, tokens = 0.0, 0
    for item in records:
        prompt = tokenizer(item["prompt"])["input_ids"]
        whole = tokenizer(item["prompt"] + item["completion"] + tokenizer.eos_token)["input_ids"]
        shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        ids = torch.tensor([whole[:max_length]])
        labels = ids.clone()
        labels[:, :shared] = -100
        count = int((labels[:, 1:] != -100).sum())
        if count:
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=labels).loss) * count
            tokens += count
    return total / tokens


@pytest.mark.parametrize("architecture", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", [32, 4], ids=["float32", "nf4"])
def test_adapter_loads_with_plain_peft_and_gives_the_same_loss(
    architecture: str, bits: int, small_model, questions: Path, command
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    model = small_model(architecture)
    extra = ("--load-in-4bit",) if bits == 4 else ()
    done = command("finetune", model, "--data", questions, "--output", "run", "--lr", "0.01", *QUICK, *extra)
    assert done.returncode == 0, done.stderr
    run = record(command.folder / "run")
    result = run["result"]
    assert result["after"]["loss"] < result["before"]["loss"] - 0.1

    quantization = None
    if bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"} if quantization else None
    )
    tokenizer = AutoTokenizer.from_pretrained(command.folder / "run" / "adapter")
    found = data.load(str(questions), eval_source=None, eval_fraction=0.05, max_eval_samples=20, seed=0, chat=False)
    # In evaluation mode bitsandbytes computes in bfloat16 on CPUs with AVX512-BF16 (5e-5 off in the loss); these
    # models have no dropout, so that training mode is the same function without it.
    base.train()
    before = stock_loss(base, tokenizer, found.held_out, 128)
    loaded = PeftModel.from_pretrained(base, command.folder / "run" / "adapter").train()
    after = stock_loss(loaded, tokenizer, found.held_out, 128)
    # float32 sums in another order and batch; in 4-bit the same dequantized weights are used on both sides
    assert before == pytest.approx(result["before"]["loss"], rel=1e-5)
    assert after == pytest.approx(result["after"]["loss"], rel=1e-5)


def test_everything_that_is_promised_is_written(small_model, questions: Path, command) -> None:
    done = command("finetune", small_model(), "--data", questions, "--json", *QUICK)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    folder = Path(summary["folder"])
    assert folder == command.folder / "runs" / f"{small_model().name}-questions"
    assert {p.name for p in folder.iterdir()} == {
        "adapter", "checkpoints", "events.jsonl", "memory.svg", "metrics.jsonl", "plot.png", "report.md", "run.json"
    }  # fmt: skip
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()

    run = record(folder)
    assert run["status"] == "finished"
    assert None not in (run["recipe"][k] for k in ("max_seq_length", "micro_batch_size", "gradient_checkpointing"))
    assert {"torch", "transformers", "trl", "peft", "python", "cruxy-triton"} <= set(run["versions"])
    assert run["recipe"]["seed"] == 0
    assert run["plan"]["fits"] is True

    rows = metrics(folder)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert all(math.isfinite(row["loss"]) and 0 < row["phase"] < 1 for row in steps)
    # the controller's throttle (equation 7), on the schedule's rate
    assert all(row["lr_used"] <= row["lr"] for row in steps)
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 12]
    assert rows[-1]["eval_loss"] == summary["after"]["loss"]

    report = (folder / "report.md").read_text(encoding="utf-8")
    assert f"{summary['after']['loss']:.4f}" in report
    assert "plot.png" in report
    used = sum(row["lr_used"] for row in steps) / sum(row["lr"] for row in steps)
    assert 0.45 < used < 0.55
    assert f"learning rate 0.0004 (linear, warm-up 0.03), of which control used {used:.0%}" in report
    assert "phase" in done.stderr, "progress goes to standard error, so that --json stays clean"


def test_a_learning_rate_of_zero_changes_nothing(small_model, questions: Path, command) -> None:
    done = command("finetune", small_model(), "--data", questions, "--output", "run", "--lr", "0", "--json", *QUICK)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["after"]["loss"] == summary["before"]["loss"]


RESUMED = (
    "--max-steps", "24", "--batch-size", "4", "--micro-batch-size", "2", "--max-seq-length", "96",
    "--max-eval-samples", "10", "--save-steps", "5", "--lora-dropout", "0.1",
)  # fmt: skip


def wait_for_steps(folder: Path, count: int, process, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    path = folder / "metrics.jsonl"
    while not (path.is_file() and path.read_text(encoding="utf-8").count('"loss"') >= count):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "training did not get there in time"
        time.sleep(0.02)


@pytest.mark.parametrize("optimizer", [pytest.param("cruxy", marks=pytest.mark.slow), "cruxy-lion"])
def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(
    optimizer: str, small_model, questions: Path, command
) -> None:
    words = ("finetune", small_model(), "--data", questions, "--optimizer", optimizer, *RESUMED)
    whole = command(*words, "--output", "whole")
    assert whole.returncode == 0, whole.stderr

    process = command.start(*words, "--output", "broken")
    wait_for_steps(command.folder / "broken", 12, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert record(command.folder / "broken")["status"] == "running"

    resumed = command("finetune", "--resume", "--output", "broken")
    assert resumed.returncode == 0, resumed.stderr
    run = record(command.folder / "broken")
    assert run["resumed_at_steps"][0] >= 10
    assert losses(command.folder / "broken") == losses(command.folder / "whole")
    assert run["result"]["after"] == record(command.folder / "whole")["result"]["after"]
    adapter = Path("adapter") / "adapter_model.safetensors"
    assert (command.folder / "whole" / adapter).read_bytes() == (command.folder / "broken" / adapter).read_bytes()


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_ctrl_c_saves_first_and_the_run_goes_on(number: int, small_model, questions: Path, command) -> None:
    words = ("finetune", small_model(), "--data", questions, *RESUMED)
    whole = command(*words, "--output", "whole")
    assert whole.returncode == 0, whole.stderr

    process = command.start(*words, "--output", "broken")
    wait_for_steps(command.folder / "broken", 7, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "stopping: finishing this step" in output
    assert "--resume --output" in output
    run = record(command.folder / "broken")
    assert run["status"] == "interrupted"
    saved = max(int(p.name[11:]) for p in (command.folder / "broken" / "checkpoints").iterdir())
    assert saved == metrics(command.folder / "broken")[-1]["step"], "the last step done is the one saved"

    refused = command("finetune", "--resume", "--output", "broken", "--lr", "0.5")
    assert refused.returncode == 2
    assert "lr" in refused.stderr

    resumed = command("finetune", "--resume", "--output", "broken")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(command.folder / "broken") == losses(command.folder / "whole")

    again = command("finetune", "--resume", "--output", "broken")
    assert again.returncode == 2
    assert "finished" in again.stderr


def test_overwrite_replaces_a_run_and_changed_data_stops_a_resume(small_model, questions: Path, command) -> None:
    own = command.folder / "own.jsonl"
    own.write_text(questions.read_text(encoding="utf-8"), encoding="utf-8")
    words = ("finetune", small_model(), "--data", own, "--output", "run", *QUICK)
    assert command(*words).returncode == 0
    first = record(command.folder / "run")
    refused = command(*words)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert record(command.folder / "run") == first

    process = command.start(*words, "--overwrite", "--seed", "3")
    while not (command.folder / "run.previous").exists():  # until then run/ still holds the earlier metrics
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    wait_for_steps(command.folder / "run", 1, process)
    process.kill()
    process.wait()
    own.write_text(own.read_text(encoding="utf-8") * 2, encoding="utf-8")
    refused = command("finetune", "--resume", "--output", "run")
    assert refused.returncode == 2
    assert "has changed since" in refused.stderr
    assert record(command.folder / "run.previous") == first, "the overwritten run is safe until the new one is done"


def test_conversations_with_a_chat_model(small_model, command) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(60)
    ]
    (command.folder / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    model = small_model("qwen2", chat=True)
    done = command("finetune", model, "--data", "chat.jsonl", "--output", "run", "--lr", "0.01", *QUICK)
    assert done.returncode == 0, done.stderr
    result = record(command.folder / "run")["result"]
    assert result["after"]["loss"] < result["before"]["loss"] - 0.2


def test_plain_text_is_packed(small_model, command) -> None:
    text = "the quick brown fox jumps over the lazy dog\n" * 600
    (command.folder / "book.txt").write_text(text)
    done = command("finetune", small_model(), "--data", "book.txt", "--output", "run", "--lr", "0.01", *QUICK)
    assert done.returncode == 0, done.stderr
    run = record(command.folder / "run")
    assert run["records"]["form"] == "text"
    assert run["result"]["after"]["loss"] < run["result"]["before"]["loss"] - 0.5


def test_gradients_are_recorded_for_the_steps_asked_for(small_model, questions: Path, command) -> None:
    from safetensors.torch import load_file

    done = command("finetune", small_model(), "--data", questions, "--output", "run", "--record-gradients", "2", *QUICK)
    assert done.returncode == 0, done.stderr
    folder = command.folder / "run" / "gradients"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00001.safetensors", "step-00002.safetensors"]
    gradients = load_file(folder / "step-00002.safetensors")
    row = metrics(command.folder / "run")[2]
    assert row["step"] == 2
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    assert norm == pytest.approx(row["grad_norm"], rel=1e-5)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "qwen3", "gpt2")]


@pytest.mark.parametrize("architecture", ["gemma", "phi", *SLOW])
def test_other_architectures_train(architecture: str, small_model, questions: Path, command) -> None:
    model = small_model(architecture)
    done = command("finetune", model, "--data", questions, "--output", "run", "--lr", "0.01", *QUICK)
    assert done.returncode == 0, done.stderr
    result = record(command.folder / "run")["result"]
    assert result["after"]["loss"] < result["before"]["loss"] - 0.02


def test_a_saved_plan_is_obeyed(small_model, questions: Path, command) -> None:
    from cruxy_triton.planner import Card, plan

    model = small_model()
    wanted = {
        "max_seq_length": 96, "batch_size": 6, "micro_batch_size": 2, "lora_r": 4, "lora_dropout": 0.1,
        "optimizer": "sgd", "chunked_loss": False, "attention": "eager", "gradient_checkpointing": True,
    }  # fmt: skip
    answer = plan(model, Card.cpu("2GiB"), **wanted)
    answer.save(command.folder / "plan.json")
    words = ("finetune", "--data", questions, "--plan", "plan.json", "--max-steps", "3", "--output", "run")
    refused = command(*words, "--lora-r", "16")
    assert refused.returncode == 2
    assert "sets lora_r = 4" in refused.stderr
    other = command(*words, small_model("gemma"))
    assert other.returncode == 2
    assert "not for" in other.stderr
    done = command(*words)
    assert done.returncode == 0, done.stderr
    run = record(command.folder / "run")
    assert {name: run["recipe"][name] for name in wanted} == wanted
    assert run["recipe"]["model"] == str(model)
    assert run["recipe"]["vram_bytes"] == 2**31
    assert run["plan"]["config"] == answer.to_dict()["config"]


@pytest.mark.slow
def test_whole_logits_give_the_same_losses_as_tiles(small_model, questions: Path, command) -> None:
    words = ("finetune", small_model(), "--data", questions, "--optimizer", "sgd", "--micro-batch-size", "2", *QUICK)
    for name, extra in (("tiles", ()), ("whole", ("--no-chunked-loss",))):
        done = command(*words, "--output", name, *extra)
        assert done.returncode == 0, done.stderr
    tiles, whole = losses(command.folder / "tiles"), losses(command.folder / "whole")
    assert whole == pytest.approx(tiles, rel=1e-4)
    result = record(command.folder / "whole")["result"]
    assert result["after"]["loss"] < result["before"]["loss"] - 0.05


# -- every weight -----------------------------------------------------------------------------------------------

FULL = ("--method", "full", "--lr", "0.003")
MODEL = Path("model") / "model.safetensors"


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
    assert f"| trained | every weight: {made['trainable_parameters']:,} parameters (float32), each layer in" in said
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


@pytest.mark.slow
def test_killed_and_interrupted_it_is_bit_for_bit_the_uninterrupted_run(small_model, questions: Path, command) -> None:
    """Once by SIGKILL in the middle of a step, once by Ctrl-C; codes of 4 bits are rounded at random."""
    # So small that PyTorch serves each step, whether or not the loops for CPUs have been compiled by then.
    model = small_model(hidden_size=32, intermediate_size=64)
    words = (
        "finetune", model, "--data", questions, *FULL, "--state-bits", "4", "--max-steps", "30", "--batch-size",
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
    assert (broken / MODEL).read_bytes() == (command.folder / "whole" / MODEL).read_bytes()
