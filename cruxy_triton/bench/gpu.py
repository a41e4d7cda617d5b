"""Everything that only a card can show, as one run of a few minutes whose result is one JSON file.

Each part is a process of its own with a time limit: a crash, a hang, a CUDA error or too little memory ends that part
and no other. Parts run in the order of their worth until the time is spent; what did not fit is listed as not run,
and `only` runs it another time. The file is written anew after each part, so an interruption keeps what is there.
"""

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cruxy_triton import files
from cruxy_triton.errors import UserError

LAST_LINES = 30  # of the output of a part that did not pass
RAN = ("passed", "failed", "crashed", "timed out", "out of memory")


@dataclass(frozen=True)
class Part:
    """`target` is module:function (part.py); `seconds` is its time limit, and a third of it what it needs to begin."""

    name: str
    target: str
    seconds: float
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def _peak(model: str, length: int, load_in_4bit: bool = False) -> Part:
    arguments = {"model": model, "length": length, "load_in_4bit": load_in_4bit}
    name = f"peak: {model} {'nf4' if load_in_4bit else 'float16'} {length}"
    return Part(name, "cruxy_triton.bench.gpu_train:peak", 75, arguments)


# In the order of their worth. Limits are for a slow card and cold caches; a fast one needs a fraction.
PARTS = (
    Part("environment", "cruxy_triton.bench.gpu_device:environment", 60),
    Part("half precision", "cruxy_triton.bench.gpu_device:half_precision", 45),
    Part("kernels", "cruxy_triton.bench.gpu_kernels:run", 150),
    Part("step", "cruxy_triton.bench.gpu_step:step", 90),
    Part("capture", "cruxy_triton.bench.gpu_step:capture", 90),
    Part("float16 run", "cruxy_triton.bench.gpu_train:float16_run", 120),
    _peak("tinyllama-1.1b", 1024),
    _peak("gemma-2b", 1024, True),
    _peak("qwen2.5-1.5b", 512),
    _peak("phi-2", 512, True),
    Part("streams, threads, devices", "cruxy_triton.bench.gpu_step:concurrency", 90),
    Part("pytest -m gpu", "cruxy_triton.bench.gpu_device:suite", 150, {"words": ["-m", "gpu"]}),
    Part("bench step", "cruxy_triton.bench.gpu_device:bench_step", 120),
    Part("sanitizer", "cruxy_triton.bench.gpu_device:sanitizer", 120, {}, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    _peak("tinyllama-1.1b", 2048),
    _peak("qwen2.5-1.5b", 1024),
    _peak("phi-2", 1024, True),
    _peak("gemma-2b", 512, True),
    _peak("tinyllama-1.1b", 512),
    _peak("qwen2.5-1.5b", 256),
    _peak("phi-2", 256, True),
    _peak("tinyllama-1.1b", 256),
    Part("host", "cruxy_triton.bench.gpu_device:host", 60),
    Part("pytest tests/kernels", "cruxy_triton.bench.gpu_device:suite", 240, {"words": ["tests/kernels"]}),
)


def run(
    out: Path,
    device: str | None,
    minutes: float,
    only: str | None,
    say: Callable[[str], None],
    parts: Sequence[Part] = PARTS,
) -> tuple[Path, dict[str, Any]]:
    """Runs the parts and returns the path of the JSON and what it holds.

    device: "cpu" runs everything as far as it goes without a card; None is the card. only: parts whose name contains
    it. Raises UserError without a CUDA device, for a folder that cannot be made and for an `only` that fits nothing.
    """
    import torch

    if device is None and not torch.cuda.is_available():
        raise UserError(
            "torch finds no CUDA device here (`cruxy-triton doctor` says why); --device cpu tries every part as far as "
            "it goes without one"
        )
    if not 0 < minutes < float("inf"):
        raise UserError(f"--minutes is {minutes}; expected a positive number")
    chosen = [part for part in parts if only is None or only in part.name]
    if not chosen:
        raise UserError(f"no part has {only!r} in its name; there are {', '.join(part.name for part in parts)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: the folder cannot be made ({error.strerror})") from None
    now = datetime.datetime.now(datetime.timezone.utc)
    path = out / f"bench-gpu-{now:%Y%m%d-%H%M%S}.json"
    report: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "device": device or "cuda",
        "minutes": minutes,
        "parts": [{"name": part.name, "status": "not run"} for part in chosen],
    }
    files.write_json(path, report)
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="cruxy-bench-") as folder, _stoppable():
        for index, part in enumerate(chosen):
            left = end - time.monotonic()
            if left < part.seconds / 3:
                continue
            record = run_part(part, device or "cuda", Path(folder) / str(index), min(left, part.seconds))
            report["parts"][index] = record
            files.write_json(path, report)
            say(line(record))
    return path, report


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, with the part that is running."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: there only Python's own signals arrive
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_part(part: Part, device: str, folder: Path, limit: float) -> dict[str, Any]:
    """One part, in a process that is ended with all of its own after `limit` seconds."""
    folder.mkdir()
    result, log = folder / "result.json", folder / "output.txt"
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder), **interpreted, **part.environment}
    command = [sys.executable, "-m", "cruxy_triton.bench.part", part.target, device, str(result)]
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, json.dumps(part.arguments)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=os.name == "posix",
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    record: dict[str, Any] = {"name": part.name, "seconds": round(time.monotonic() - started, 1)}
    if code is None:
        record |= {"status": "timed out", "failures": [f"not done after {limit:.0f} s"]}
    elif not result.exists():
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        record |= {"status": "crashed", "failures": [f"ended with {how}"]}
    else:
        record |= json.loads(result.read_text(encoding="utf-8"))
    if record["status"] not in ("passed", "skipped"):
        record["last_lines"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    return record


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and what it started."""
    if os.name == "posix":
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def line(record: dict[str, Any]) -> str:
    """A part's outcome in one line."""
    failures = record.get("failures", [])
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    why = f"  {failures[0]}{more}" if failures else ""
    seconds = f"{record['seconds']:>6.1f} s" if "seconds" in record else ""
    return f"{record['name']:<34}{record['status']:<15}{seconds}{why}".rstrip()


def passed(report: dict[str, Any]) -> bool:
    """Whether something ran, and all of it passed."""
    ran = [part["status"] for part in report["parts"] if part["status"] in RAN]
    return bool(ran) and set(ran) == {"passed"}
