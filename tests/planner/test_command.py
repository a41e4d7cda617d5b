"""`cruxy-triton plan` as a process: exit codes, output, no torch, and the time that it takes."""

import json
import subprocess
import sys
import time

import pytest

from cruxy_triton.cli import main
from cruxy_triton.planner import Plan


def test_exit_codes(capsys):
    assert main(["plan", "smollm2-135m", "--gpu", "gtx1650", "--seq", "256"]) == 0
    assert "fits" in capsys.readouterr().out
    assert main(["plan", "phi-2", "--vram", "1GiB", "--seq", "256", "--lora-r", "4"]) == 1
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which model?"),
        (["smollm3-135m", "--gpu", "t4"], "nearest: smollm2-135m"),
        (["phi-2", "--gpu", "gtx-1640"], "nearest"),
        (["phi-2", "--vram", "4"], "Was the unit forgotten?"),
        (["phi-2", "--gpu", "t4", "--seq", "-5"], "seq must be between"),
        (["phi-2", "--gpu", "t4", "--seq", "4096"], "maximum of 2048"),
        (["phi-2", "--gpu", "t4", "--capability", "8.6"], "--capability belongs to --vram"),
        (["phi-2", "--vram", "4GiB", "--capability", "new"], "must look like 7.5"),
        (["phi-2", "--cpu", "64GiB", "--precision", "float32", "--verify"], "--verify traces a CUDA run"),
    ],
)
def test_bad_input(words, said, capsys):
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["phi-2", "--seq", "many"], ["phi-2", "--os", "beos"], ["phi-2", "--vram"]])
def test_bad_options(words):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *words])
    assert stopped.value.code == 2


def test_json_and_save(tmp_path, capsys):
    path = tmp_path / "plan.toml"
    words = ["plan", "smollm2-135m", "--gpu", "rtx3060", "--seq", "256", "--os", "windows"]
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
