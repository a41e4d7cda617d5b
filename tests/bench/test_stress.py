"""The stress suite: its table and verdict by hand, its clipping against definitions, one tiny grid as a command."""

import json
import math

import pytest
import torch

from cruxy_triton.bench import adapters, stress
from cruxy_triton.bench.characters import Size, Text
from cruxy_triton.bench.stress import Run
from cruxy_triton.errors import UserError


def made(losses: dict[tuple[float, bool], list[float]]) -> list[Run]:
    return [
        Run("t", "AdamW", lr, guard, seed, loss, "", False)
        for (lr, guard), values in losses.items()
        for seed, loss in enumerate(values)
    ]


def test_verdict_by_hand():
    runs = made({
        (1e-3, False): [2.0, 2.2], (1e-3, True): [2.1, 2.1],
        (1e-2, False): [3.0, math.inf], (1e-2, True): [2.2, 2.3],
        (3e-2, False): [4.0, 4.0], (3e-2, True): [2.0, 2.0],
        (1e-1, False): [9.0, 9.0], (1e-1, True): [9.0, 9.0],
    })  # fmt: skip
    (row,) = stress.verdict(runs)
    assert row["tuned lr"] == 1e-3
    assert row["tuned loss"] == pytest.approx(2.1)
    assert row["spread over seeds"] == pytest.approx(0.2)
    assert row["worst to 30x without"] == math.inf
    assert row["worst to 30x with"] == pytest.approx(2.3 / 2.1)  # 3e-2 is 30 times, 1e-1 is beyond
    assert row["held"] == "yes"
    worse = [r for r in runs if not (r.guard and r.lr == 1e-2)] + made({(1e-2, True): [2.32]})
    assert stress.verdict(worse)[0]["held"] == "no"
    assert [r["1e-05"] for r in stress.rows(made({(1e-5, False): [1.0, 3.0]}))] == [2.0]


def test_adagc_and_zclip_do_as_published():
    p = torch.nn.Parameter(torch.zeros(4))

    def grad(norm: float) -> None:
        p.grad = torch.tensor([norm, 0.0, 0.0, 0.0])

    adagc = stress.AdaGC(steps=20)  # warm-up: two steps
    for norm in (0.5, 0.4):
        grad(norm)
        adagc([p])
    assert adagc.history == pytest.approx([0.4])  # the least of the warm-up
    grad(2.0)
    adagc([p])
    assert float(p.grad.norm()) == pytest.approx(1.05 * 0.4)  # pyright: ignore[reportOptionalMemberAccess]
    assert adagc.history == pytest.approx([0.98 * 0.4 + 0.02 * 1.05 * 0.4])

    zclip = stress.ZClip()
    for i in range(25):
        grad(0.5 + 0.1 * (-1) ** i)
        zclip([p])
    mean = 0.5 + 0.1 / 25
    deviation = math.sqrt(0.01 - (0.1 / 25) ** 2)
    grad(1.5)
    zclip([p])
    score = (1.5 - mean) / deviation
    assert float(p.grad.norm()) == pytest.approx(mean + 2.5 * deviation / (score / 2.5), rel=1e-3)  # pyright: ignore[reportOptionalMemberAccess]


def test_batches_are_shifted_by_one_and_held_out_is_not_trained_on():
    text = Text("".join(chr(97 + i % 26) for i in range(2000)), stress.QUICK)
    inputs, targets = text.batch(7)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal((inputs + 1) % 26, targets)
    assert len(text.train) + len(text.held_out) == 2000


def test_tiny_grid_as_a_command(command):
    words = ("bench", "stress", "--quick", "--seeds", "1", "--optimizers", "AdamW", "Cruxy Lion", "--json")
    done = command(*words, "--workers", "2", "--out", "runs.jsonl")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)

    # Interrupted after two runs and called again: only the others are made, and they come out the same.
    path = command.folder / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 8
    path.write_text("".join(lines[:2]))
    again = command(*words, "--out", "runs.jsonl")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("lr ") == 6
    assert sorted(json.loads(again.stdout)["runs"], key=str) == sorted(result["runs"], key=str)
    refused = command("bench", "stress", "--seeds", "1", "--out", "runs.jsonl")
    assert refused.returncode == 2
    assert "runs.jsonl, line 1: a run of Size(layers=1" in refused.stderr

    assert len(result["runs"]) == 8
    assert {row["optimizer"] for row in result["verdict"]} == {"AdamW", "Cruxy Lion"}
    assert all(math.isfinite(run["loss"]) for run in result["runs"])
    guarded = {run["lr"]: run for run in result["runs"] if run["guard"] and run["optimizer"] == "AdamW"}
    assert "rollback" in guarded[3e-2]["actions"]
    assert "rollback" not in guarded[1e-3]["actions"]


def test_adapters_on_a_chat_model(chat_model):
    """Only adapters are trained, and a wild rate is survived under the guard."""
    text = adapters.Questions(chat_model, Size(layers=2, width=64, context=16, batch=2, steps=12, evaluations=2))
    inputs, targets = text.batch(3)
    assert inputs.shape == targets.shape == (2, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    model = text.model()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    tame, wild = (stress.run(text, adapters.NAME, "AdamW", lr, True, 0) for lr in (1e-3, 1.0))
    assert tame.actions == "no action was needed"
    assert "rollback" in wild.actions
    assert math.isfinite(wild.loss)
    with pytest.raises(UserError, match=r"train\.jsonl cannot be read: No such file"):
        adapters.Questions(chat_model / "elsewhere", adapters.QUICK)
    (chat_model / adapters.FILES[0]).write_text("{}\n")
    with pytest.raises(UserError, match="is not GSM8K: expected JSON lines with a question and an answer"):
        adapters.Questions(chat_model, adapters.QUICK)


def test_bad_input(command, tmp_path):
    done = command("bench", "stress", "--model", "smollm2")
    assert done.returncode == 2
    assert "--model smollm2 needs --data" in done.stderr
    done = command("bench", "stress", "--optimizers", "Nonesuch")
    assert done.returncode == 2
    assert "unknown optimizer 'Nonesuch'" in done.stderr
    done = command("bench", "stress", "--data", str(tmp_path))
    assert done.returncode == 2
    assert "tinyshakespeare.txt cannot be read: No such file" in done.stderr


def test_faults_as_a_command(command):
    done = command("bench", "faults", "--count", "8")
    assert done.returncode == 0, done.stderr
    assert "not as they should be: 0" in done.stdout
