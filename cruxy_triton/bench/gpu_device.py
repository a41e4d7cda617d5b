"""Parts of `bench gpu` about the machine: what it has, half precision, the test suite, peers, the sanitizer."""

import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from cruxy_triton.bench.part import Skip

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, where this is one


def environment(device: str) -> dict[str, Any]:
    """Card, driver, versions, and what `cruxy-triton doctor` says."""
    from cruxy_triton.doctor import examine

    found = examine()
    if device != "cpu":
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize()
        properties = torch.cuda.get_device_properties(0)
        found["card"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "total_bytes": properties.total_memory,
            "devices": torch.cuda.device_count(),
            "smi": smi("driver_version", "memory.used", "clocks.max.memory", "power.limit"),
        }
    found["platform"] = platform.platform()
    errors = [problem["what"] for problem in found["problems"] if problem["severity"] == "error"]
    return found | {"failures": errors}


def smi(*queries: str) -> list[str] | None:
    """nvidia-smi's answers about the first visible card, None where it is not installed or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = [tool, "-i", index, f"--query-gpu={','.join(queries)}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return [word.strip() for word in answer.stdout.split(",")] if answer.returncode == 0 else None


def half_precision(device: str) -> dict[str, Any]:
    """float16 and bfloat16 against float64: some cards of the GTX 16 series give NaN in half precision."""
    failures, errors = [], {}
    norm, attention = torch.nn.functional.layer_norm, torch.nn.functional.scaled_dot_product_attention
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=generator, dtype=torch.float64) for _ in range(2))
    for dtype, unit in ((torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        x, y = a.to(dtype).to(device), b.to(dtype).to(device)
        q, k = x.view(1, 8, 32, 512), y.view(1, 8, 32, 512)
        exact, steep, q64, k64 = (t.cpu().double() for t in (x, x * 60, q, k))
        weights = torch.softmax(q64 @ k64.transpose(2, 3) / math.sqrt(512), 3)
        checks = {
            "matmul": (x @ y.T, exact @ y.cpu().double().T, 40.0),
            "softmax": (torch.softmax(x * 60, 1), torch.softmax(steep, 1), 1.0),
            "layer_norm": (norm(x, (512,)), norm(exact, (512,)), 4.0),
            "attention": (attention(q, k, k), weights @ k64, 4.0),
        }
        for name, (got, wanted, size) in checks.items():
            word = f"{name} {str(dtype).removeprefix('torch.')}"
            error = float((got.cpu().double() - wanted).abs().max())
            errors[word] = error
            if not error <= 4 * unit * size:  # NaN as well
                failures.append(f"{word} is off by {error:.3g}; expected at most {4 * unit * size:.3g}")
    return {"largest_error": errors, "failures": failures}


def suite(device: str, words: list[str]) -> dict[str, Any]:
    """The tests of the checkout that this package runs from."""
    if not (ROOT / "tests" / "conftest.py").is_file():
        raise Skip("the package runs from no checkout, so its tests are not at hand")
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed; pip install -e '.[train,test]'")
    if device == "cpu":
        raise Skip("without a CUDA device the plain `pytest` runs what can run")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    sys.stdout.write(done.stdout + done.stderr)
    failed = [text for text in done.stdout.splitlines() if text.startswith(("FAILED", "ERROR"))]
    if done.returncode and not failed:
        failed = [f"pytest ended with exit code {done.returncode}"]
    summary = next((text for text in reversed(done.stdout.splitlines()) if " in " in text), "")
    return {"summary": summary.strip("= "), "failures": failed}


def bench_step(device: str) -> dict[str, Any]:
    """The step against its peers over a LoRA of rank 8, float32 and 16-bit."""
    from cruxy_triton.bench import step

    few = device == "cpu"
    tables = {dtype: step.run(device, "lora-r8", 1 if few else 8, dtype) for dtype in ("fp32", "fp16")}
    return {"tables": tables}


def host(device: str) -> dict[str, Any]:
    """What the step costs this machine's processor."""
    from cruxy_triton.bench import host

    return host.run(rounds=5 if device == "cpu" else 50)


def sanitizer(device: str) -> dict[str, Any]:
    """One step of every rule under compute-sanitizer's memcheck, each tensor in an allocation of its own."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if device == "cpu":
        raise Skip("compute-sanitizer watches a CUDA device")
    if tool is None:
        raise Skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        target = ["cruxy_triton.bench.part", "cruxy_triton.bench.gpu_step:every_rule", device, str(result), "{}"]
        command = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "86"]
        done = subprocess.run([*command, sys.executable, "-m", *target], capture_output=True, text=True, check=False)
        sys.stdout.write(done.stdout + done.stderr)
        lines = [text.strip("= ") for text in done.stdout.splitlines() if text.startswith("=========")]
        summary = next((text for text in lines if "ERROR SUMMARY" in text), "")
        inner = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {"failures": ["no result"]}
    failures = list(inner["failures"])
    if done.returncode:
        failures.append(f"compute-sanitizer ended with exit code {done.returncode}: {summary or 'no summary'}")
    return {"summary": summary, "failures": failures}
