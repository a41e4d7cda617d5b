"""`bench gpu`: parts that fail in every way leave the others and the file alone; every part runs without a card."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cruxy_kernels as kernels
from cruxy_triton.bench import gpu, gpu_train, oracles
from cruxy_triton.bench.gpu import Part
from cruxy_triton.cli import main
from cruxy_triton.planner import load_model

FAKES = """
import os, signal, subprocess, sys, time
from cruxy_triton.bench.part import Skip

class OutOfMemoryError(RuntimeError): pass

def good(device, number=1): return {"device": device, "number": number}
def wrong(device): return {"seen": 2, "failures": ["2 is not 3", "nor 4"]}
def raises(device): print("said before"); raise ValueError("no such thing\\nsecond line")
def leaves(device): os._exit(3)
def crashes(device): os.kill(os.getpid(), signal.SIGSEGV)
def full(device): raise OutOfMemoryError("CUDA out of memory")
def absent(device): raise Skip("there is no second device")
def hangs(device, pids):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(pids, "w") as file: file.write(f"{os.getpid()} {child.pid}")
    time.sleep(600)
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    folder = tmp_path / "fakes"
    folder.mkdir()
    (folder / "fakes.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def gone(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_every_way_to_fail(fakes, tmp_path, monkeypatch):
    pids = fakes / "pids"
    parts = [
        Part("good", "fakes:good", 30, {"number": 7}),
        Part("wrong", "fakes:wrong", 30),
        Part("raises", "fakes:raises", 30),
        Part("leaves", "fakes:leaves", 30),
        Part("crashes", "fakes:crashes", 30),
        Part("full", "fakes:full", 30),
        Part("absent", "fakes:absent", 30),
        Part("missing", "fakes:missing", 30),
        Part("long", "fakes:good", 900),
        Part("hangs", "fakes:hangs", 3, {"pids": str(pids)}),
        Part("again", "fakes:good", 30),
    ]
    said: list[str] = []
    path, report = gpu.run(tmp_path / "out", "cpu", 1, None, said.append, parts)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text()) == report
    found = {part["name"]: part for part in report["parts"]}
    assert list(found) == [part.name for part in parts]
    statuses = {name: part["status"] for name, part in found.items()}
    assert statuses == {
        "good": "passed", "wrong": "failed", "raises": "failed", "leaves": "crashed", "crashes": "crashed",
        "full": "out of memory", "absent": "skipped", "missing": "failed", "long": "not run", "hangs": "timed out",
        "again": "passed",
    }  # fmt: skip
    assert found["good"]["found"] == {"device": "cpu", "number": 7}
    assert found["wrong"]["failures"] == ["2 is not 3", "nor 4"]
    assert found["wrong"]["found"] == {"seen": 2}
    assert found["raises"]["failures"] == ["ValueError: no such thing"]
    assert "said before" in found["raises"]["last_lines"]
    assert found["leaves"]["failures"] == ["ended with exit code 3"]
    assert found["crashes"]["failures"] == ["ended with signal SIGSEGV"]
    assert found["absent"]["failures"] == ["there is no second device"]
    assert all(gone(int(pid)) for pid in pids.read_text().split())
    assert len(said) == len(parts) - 1
    assert not gpu.passed(report)


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [(["passed", "skipped", "not run"], True), (["passed", "out of memory"], False), (["skipped"], False)],
)
def test_exit_code(statuses, verdict):
    assert gpu.passed({"parts": [{"status": status} for status in statuses]}) is verdict


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_keeps_what_is_there(fakes, tmp_path, number):
    pids = fakes / "pids"
    code = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a script inherits that it is ignored
from cruxy_triton.bench import gpu
from cruxy_triton import cli
good, last = gpu.Part("good", "fakes:good", 60), gpu.Part("last", "fakes:good", 60)
hangs = gpu.Part("hangs", "fakes:hangs", 60, {{"pids": {str(pids)!r}}})
gpu.run.__defaults__ = ([good, hangs, last],)
sys.exit(cli.main(["bench", "gpu", "--device", "cpu", "--out", {str(tmp_path / "out")!r}]))
"""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(temporary)})
    until = time.monotonic() + 60
    while not (pids.exists() and len(pids.read_text().split()) == 2) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == 130
    (path,) = (tmp_path / "out").iterdir()
    assert [part["status"] for part in json.loads(path.read_text())["parts"]] == ["passed", "not run", "not run"]
    assert all(gone(int(pid)) for pid in pids.read_text().split())
    assert not list(temporary.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_without_a_card(tmp_path, capsys):
    assert main(["bench", "gpu", "--out", str(tmp_path)]) == 2
    assert "--device cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--only", "nothing"], "no part has"), (["--minutes", "0"], "positive"), (["--out", "file/x"], "cannot be made")],
)
def test_bad_input(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["bench", "gpu", "--device", "cpu", "--out", "out", *words]) == 2
    assert message in capsys.readouterr().err


# One of each kind; the peaks differ in the model only.
REAL = {
    "environment": {},
    "half precision": {},
    "kernels": {"every": 60},
    "step": {},
    "capture": {},
    "streams, threads, devices": {},
    "float16 run": {"steps": 12},
    "peak: gemma-2b nf4 1024": {},
}


@pytest.mark.parametrize("name", list(REAL))
def test_parts_without_a_card(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    part = next(part for part in gpu.PARTS if part.name == name)
    part = Part(name, part.target, 120, part.arguments | REAL[name], part.environment)
    record = gpu.run_part(part, "cpu", tmp_path / "part", 120)
    assert record["status"] == "passed", "\n".join([*record["failures"], *record.get("last_lines", [])])
    assert record["found"]


def test_each_part_can_be_called():
    """Names and arguments of every part, those that need a card included."""
    import importlib
    import inspect

    for part in gpu.PARTS:
        module, name = part.target.split(":")
        function = getattr(importlib.import_module(module), name)
        inspect.signature(function).bind("cuda", **part.arguments)
        if part.name.startswith("peak"):
            load_model(part.arguments["model"])
    assert len({part.name for part in gpu.PARTS}) == len(gpu.PARTS)
    assert sum(part.name.startswith("peak") for part in gpu.PARTS) == 12


@pytest.mark.parametrize("model", ["phi-2", "gemma-2b"])
def test_checkpoints_are_whole_and_mostly_holes(model, tmp_path):
    from safetensors import safe_open

    total = gpu_train.write_checkpoint(tmp_path / "model", gpu_train.config_of(model, tiny=False))
    assert total == 2 * load_model(model).parameters
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) == (2 if total > gpu_train.SHARD_BYTES else 1)
    shapes = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                shapes[name] = torch.Size(opened.get_slice(name).get_shape())
    assert 2 * sum(shape.numel() for shape in shapes.values()) == total
    assert sum(file.stat().st_blocks * 512 for file in files) < total / 20


# -- the oracles can say no ------------------------------------------------------------------------------------


def test_oracles_pass_the_reference_and_see_what_is_wrong():
    generator = torch.Generator().manual_seed(0)
    row = oracles.control_row(generator, LR_OUT=1e-2)
    for rule, dtype, bits in (("lion", torch.float32, 8), ("lion", torch.bfloat16, 32), ("adamw", torch.float16, 32)):
        before = {
            "p": torch.randn(700, generator=generator).to(dtype),
            "g": torch.randn(700, generator=generator).to(dtype),
        }
        if bits == 8:
            before["exp_avg"], before["exp_avg_scale"] = kernels.quantize_blockwise(
                torch.randn(700, generator=generator)
            )
        else:
            before["exp_avg"] = torch.randn(700, generator=generator)
        if rule == "adamw":
            before["exp_avg_sq"] = torch.rand(700, generator=generator)
        after = {name: value.clone() for name, value in before.items() if name != "g"}
        state = {name: [value] for name, value in after.items() if name != "p"}
        kernels.update_(rule, [after["p"]], [before["g"]], state, row[None], backend="torch")
        assert oracles.check_update(rule, before, after, row) == []
        for name in after:
            spoiled = {key: value.clone() for key, value in after.items()}
            spoiled[name][-1] += 3 if name == "exp_avg" and bits == 8 else spoiled[name][-1].abs() * 0.05 + 0.02
            assert oracles.check_update(rule, before, spoiled, row), (rule, name)
        skipped = row.clone()
        skipped[kernels.layout.SKIP] = 1
        assert oracles.check_update(rule, before, after, skipped)


def test_oracles_of_telemetry_and_guards():
    g = torch.tensor([1.0, -2.0, float("nan"), 0.5])
    got = kernels.gradient_telemetry([g], gamma=1.5)
    assert oracles.check_telemetry(got, [g], 1.5) == []
    for i in range(4):
        spoiled = got.clone()
        spoiled[i] *= 1.001
        assert len(oracles.check_telemetry(spoiled, [g], 1.5)) == 1
    held = oracles.Guarded(torch.arange(6.0), offset=3)
    held.tensor += 1
    assert held.check("x") == []
    assert held.check("x", whole=True)
    held.buffer[held.inside.stop] = 0
    assert held.check("x")
