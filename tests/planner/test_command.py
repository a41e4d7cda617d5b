"""`cruxy-triton plan` as a process: exit codes, output, no torch, and the time that it takes."""

import json
import subprocess
import sys
import time

import pytest

from cruxy_triton.cli import main
from cruxy_triton.planner import Plan


def test_exit_codes(capsys):
    assert main(["plan", "smollm2-135m", "--gpu", "gtx1650", "--max-seq-length", "256"]) == 0
    assert "fits" in capsys.readouterr().out
    assert main(["plan", "phi-2", "--vram", "1GiB", "--max-seq-length", "256", "--lora-r", "4"]) == 1
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which model?"),
        (["smollm3-135m", "--gpu", "t4"], "nearest: smollm2-135m"),
        (["phi-2", "--gpu", "gtx-1640"], "nearest"),
        (["phi-2", "--vram", "4"], "Was the unit forgotten?"),
        (["phi-2", "--gpu", "t4", "--max-seq-length", "-5"], "--max-seq-length is -5; expected a whole number"),
        (["phi-2", "--gpu", "t4", "--max-seq-length", "4096"], "maximum of 2048"),
        (["phi-2", "--max-seq-length", "many"], "--max-seq-length is 'many'; expected a whole number"),
        (["phi-2", "--vram", "0"], "expected 256 MiB to 4 TiB"),
        (["phi-2", "--gpu", "t4", "--vram", "64GiB"], "is more than Tesla T4 has"),
        (["phi-2", "--os", "beos"], "--os is 'beos'; expected one of linux"),
        (["phi-2", "--vram", "4GiB", "--os", "windows"], "--os windows belongs to a card of --gpu"),
        (["phi-2", "--device", "cpu"], "needs --vram"),
        (["phi-2", "--device", "cpu", "--gpu", "t4"], "--gpu belongs to a CUDA device"),
        (["phi-2", "--device", "cpu", "--vram", "8GiB", "--dtype", "float16"], "cannot train on a CPU"),
        (["phi-2", "--vram"], "--vram: expected one argument"),
        (["phi-2", "--gpu", "t4", "--gpu", "t4"], "--gpu is given twice"),
        (["phi-2", "--gpu", "t4", "--max-seq", "64"], "did you mean --max-seq-length?"),
        (["phi-2", "--gpu", "t4", "--save", "plan.toml"], "name it plan.json"),
        (["phi-2", "--vram", "4GiB", "--capability", "99.9"], "--capability is '99.9'; expected one of"),
        (["phi-2", "--gpu", "t4", "--capability", "8.6"], "--capability belongs to --vram"),
        (["phi-2", "--vram", "4GiB", "--capability", "new"], "expected one of 7.0"),
        (["phi-2", "--device", "cpu", "--vram", "64GiB", "--verify"], "--verify traces a CUDA run"),
    ],
)
def test_bad_input(words, said, capsys):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_json_and_save(tmp_path, capsys):
    path = tmp_path / "plan.json"
    words = ["plan", "smollm2-135m", "--gpu", "rtx3060-12gb", "--max-seq-length", "256", "--os", "windows"]
    assert main([*words, "--json", "--save", str(path)]) == 0
    shown = Plan.from_dict(json.loads(capsys.readouterr().out))
    assert shown == Plan.load(path)
    assert (shown.os, shown.config.max_seq_length) == ("windows", 256)


def test_list(capsys):
    assert main(["plan", "--list"]) == 0
    out = capsys.readouterr().out
    assert "tinyllama-1.1b" in out
    assert "gtx1650-gddr5" in out


SCRIPT = """
import sys
from cruxy_triton.cli import main
code = main(["plan", "qwen2.5-1.5b", "--gpu", "gtx1650"])
assert "torch" not in sys.modules, "torch was imported"
assert "transformers" not in sys.modules
sys.exit(code)
"""


def test_answers_without_torch_and_quickly():
    """Under 1.5 s with Python's start where the machine is idle; the bound here allows for a busy one."""
    begun = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    taken = time.perf_counter() - begun
    assert result.returncode == 0, result.stderr
    assert "headroom" in result.stdout
    assert taken < 6


@pytest.mark.slow
def test_verify(capsys):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    assert main(["plan", "qwen2.5-1.5b", "--gpu", "gtx1650", "--verify", "--json"]) == 0
    found = Plan.from_dict(json.loads(capsys.readouterr().out))
    assert found.allocated_bytes == pytest.approx(found.verified["allocated_bytes"], rel=0.002)
    assert found.peak_bytes == pytest.approx(
        found.verified["smallest_pool_bytes"] + found.components["context"], rel=0.02
    )
