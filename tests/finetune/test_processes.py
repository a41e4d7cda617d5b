"""Two processes on the CPU, started by torchrun: the run of one process, one writer, and an end for both."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from cruxy_triton.errors import UserError
from cruxy_triton.finetune import processes, run
from cruxy_triton.finetune.folder import RunFolder
from cruxy_triton.finetune.recipe import Recipe

# 95 records to train on: the last step of the epoch has fewer than its 8, and fewer than two processes can share.
RUN = ("--batch-size", "8", "--micro-batch-size", "2", "--max-seq-length", "64", "--max-eval-samples", "5",
       "--lr", "0.003", "--save-steps", "4", "--sample-tokens", "4", "--samples", "1", "--device", "cpu")  # fmt: skip


def start(command: Any, *words: Any, count: int = 2) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [*launcher, "-m", "cruxy_triton", *map(str, words)], cwd=command.folder,
        env=command.environment(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not ((folder / "metrics.jsonl").is_file() and len(rows(folder)) > count):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "training did not get there in time"
        time.sleep(0.05)


def same_run(one: Path, two: Path) -> None:
    """Losses, tokens and adapters, up to the order in which gradients are added."""
    ones, twos = rows(one), rows(two)
    assert [row["step"] for row in twos] == [row["step"] for row in ones]
    for a, b in zip(ones, twos, strict=True):
        assert b.get("tokens") == a.get("tokens")
        for name in {"loss", "eval_loss", "grad_norm", "accuracy", "lr_used"} & set(a):
            assert b[name] == pytest.approx(a[name], rel=2e-3), (a["step"], name)
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    difference = sum((a[name] - b[name]).square().sum() for name in a)
    assert math.sqrt(difference / sum(t.square().sum() for t in a.values())) < 1e-2


def test_two_processes_are_one_run(small_model, sums: Path, command) -> None:
    words = ("finetune", small_model(), "--data", sums, *RUN)
    alone = command(*words, "--output", "one", OMP_NUM_THREADS="1")
    assert alone.returncode == 0, alone.stderr
    process = start(command, *words, "--output", "two")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    one, two = command.folder / "one", command.folder / "two"
    same_run(one, two)
    found = {folder: {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} for folder in (one, two)}
    # Each process keeps the state of its random numbers in a checkpoint.
    apart = {name for name in found[two] ^ found[one] if "rng_state" not in name}
    assert not apart
    said = json.loads((two / "run.json").read_text())
    assert (said["processes"], said["status"], said["result"]["after"]["sequences"]) == (2, "finished", 5)
    assert output.count("plan: ") == 1, "one process speaks"
    assert "on each of 2 devices, of every step's sequences 4" in output


@pytest.mark.slow
def test_both_stop_and_go_on_and_neither_survives_the_other(small_model, sums: Path, command) -> None:
    words = ("finetune", small_model(), "--data", sums, *RUN, "--epochs", "2")
    process = start(command, *words, "--output", "broken")
    folder = command.folder / "broken"
    wait_for_steps(folder, 5, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("stopping: finishing this step") == 1, output
    assert output.count("cruxy-triton finetune --resume") == 1, output
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    saved = max(int(p.name[11:]) for p in (folder / "checkpoints").iterdir())
    assert saved == rows(folder)[-1]["step"], "the last step done is the one saved"

    process = start(command, "finetune", "--resume", "--output", "broken")
    wait_for_steps(folder, saved + 5, process)
    ranks = {int(p.environ().get("RANK", -1)): p for p in psutil.Process(process.pid).children(recursive=True)}
    ranks[1].kill()
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks.values())
    assert json.loads((folder / "run.json").read_text())["status"] in ("failed", "interrupted")

    # The rest in one process: the batches are the same ones.
    resumed = command("finetune", "--resume", "--output", "broken", OMP_NUM_THREADS="1")
    assert resumed.returncode == 0, resumed.stderr
    whole = command(*words, "--output", "whole", OMP_NUM_THREADS="1")
    assert whole.returncode == 0, whole.stderr
    same_run(command.folder / "whole", folder)


def test_what_cannot_be_shared_is_refused_once(small_model, sums: Path, command) -> None:
    words = ("--batch-size", "6", *RUN[2:], "--output", "run")
    process = start(command, "finetune", small_model(), "--data", sums, *words)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    said = "error: --batch-size 6 cannot be divided among 2 processes in micro-batches of 2; give a multiple"
    assert output.count(said) == 1, output
    assert not (command.folder / "run").exists()


@pytest.mark.parametrize(
    ("settings", "odd"),
    [
        ({"method": "full"}, "--method full"),
        ({"layerwise": "blade"}, "--layerwise blade"),
        ({"lr": "auto"}, "--lr auto"),
        ({"eval_steps": 2}, "--eval-steps"),
    ],
)
def test_what_is_of_one_process_is_refused(settings: dict, odd: str, tmp_path: Path, monkeypatch) -> None:
    recipe = Recipe("m", "d", str(tmp_path / "run"), device="cpu", **settings)
    made = run._Run(recipe, RunFolder(recipe.output), run.Hooks(), [], processes.Processes(2))
    with pytest.raises(UserError, match=f"{odd} is for one process, and these are 2"):
        made._read()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_other_engines_are_refused(name: str, monkeypatch) -> None:
    for variable in ("WORLD_SIZE", *processes.NEEDED, f"ACCELERATE_USE_{name}"):
        monkeypatch.setenv(variable, "2" if variable == "WORLD_SIZE" else "true")
    with pytest.raises(UserError, match=f"is asked for \\(ACCELERATE_USE_{name} is set\\), and a run keeps the whole"):
        processes.start("cpu")
    assert not torch.distributed.is_initialized()


def test_the_order_of_several_is_that_of_one() -> None:
    from accelerate.data_loader import SeedableRandomSampler

    from cruxy_triton.finetune.train import Padded

    one, several = SeedableRandomSampler(range(7), data_seed=3), Padded(7, 3, 4)
    for epoch in (0, 2):
        one.set_epoch(epoch)
        several.set_epoch(epoch)
        assert list(several) == [*one, 7]
        assert len(several) == 8
    assert len(Padded(8, 3, 4)) == 8
    assert os.environ.get("WORLD_SIZE") is None
