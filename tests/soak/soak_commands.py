"""The command line with random options, garbage for files, signals at random moments and readers that go away.

Whatever comes, the exit code is 0, 1, 2 or 130 (or SIGTERM's own), there is no traceback without --debug, an exit
code of 2 comes with one sentence and leaves no file behind, and nothing temporary is left by any.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cruxy_triton.bench import gpu_train
from cruxy_triton.cli import COMMANDS, build_parser

sys.path.insert(0, str(Path(__file__).parent))
from soak_common import Fault, soak

BASE = Path(tempfile.mkdtemp(prefix="cruxy-soak-"))
CODES = (0, 1, 2, 130)
WORDS = (
    "0", "1", "-1", "7", "64", "1e9", "nan", "inf", "-inf", "", " ", "abc", "4GiB", "300 MiB", "4 GB",
    "99999999999999", "0x10",
    "1,2", "None", "true", "\u2603", "a/b", "../..", "/dev/null", "/proc/self/mem", "x" * 300, "--", "-", "%s", "*",
)  # fmt: skip
FILES = (
    "model",
    "sums.jsonl",
    "text.txt",
    "empty",
    "binary",
    "half.json",
    "array.json",
    "folder",
    "absent",
    "plan.toml",
)
LIKELY = {
    "model": ("model", "tinyllama-1.1b", "phi-2", "smollm2-135m"), "--data": ("sums.jsonl", "text.txt"),
    "--max-steps": ("1", "2"), "--batch-size": ("2", "4"), "--max-seq-length": ("32", "64"), "--output": ("run", "out"),
    "--gpu": ("gtx1650", "t4", "rtx3060-12gb"), "--vram": ("4GiB", "6g"), "--rounds": ("1",), "--census": ("lora-r8",),
    "--save": ("plan.toml",), "--plan": ("plan.toml",), "--gradients": ("folder", "binary"), "--lora-r": ("2", "8"),
    "--target-modules": ("q_proj", "all-linear"), "--max-eval-samples": ("2",), "--sample-tokens": ("0", "3"),
    "--epochs": ("1",), "--seed": ("3",), "--arch": ("sm_75",), "--dtype": ("float32", "fp32"), "--device": ("cpu",),
}  # fmt: skip
SLOW = ("--trust-remote-code", "--demo", "--verify", "--debug")  # and --debug asks for tracebacks


def prepare(folder: Path) -> None:
    """A small model, records, and files that are none."""
    gpu_train.write_checkpoint(folder / "model", gpu_train.config_of("tinyllama-1.1b", tiny=True))
    gpu_train.write_tokenizer(folder / "model")
    gpu_train.write_text(folder / "text.txt", 4000)
    rows = [{"prompt": f"{a} plus {b}?", "completion": f" {a + b}"} for a in range(8) for b in range(8)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "empty").touch()
    (folder / "binary").write_bytes(random.Random(0).randbytes(3000))
    (folder / "half.json").write_text('{"model_type": "llama", "hidden_')
    (folder / "array.json").write_text("[1, 2]")
    (folder / "folder").mkdir()
    (folder / "plan.toml").write_text('model = "x"\n[config]\nprecision = 3\n')


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [
        action for action in parser._actions if not isinstance(action, (argparse._HelpAction, argparse._VersionAction))
    ]


def value_of(rng: random.Random, name: str, action: argparse.Action) -> str:
    if rng.random() < 0.75:
        if action.choices:
            return str(rng.choice(list(action.choices)))
        if name in LIKELY:
            return rng.choice(LIKELY[name])
        if rng.random() < 0.5:
            return rng.choice(("1", "2", "0.5", "8"))
    return rng.choice((*WORDS, *FILES))


def command_line(rng: random.Random) -> list[str]:
    if rng.random() < 0.05:
        return [rng.choice((*WORDS, *COMMANDS, "--version", "--help")) for _ in range(rng.randrange(3))]
    command = rng.choice(("plan", "plan", "finetune", "finetune", "finetune", "bench", "kernels", "doctor"))
    parser: Any = next(a for a in build_parser(command)._actions if isinstance(a, argparse._SubParsersAction)).choices[
        command
    ]
    words = [command]
    kinds = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    if kinds is not None:
        kind = rng.choice([name for name in kinds.choices if name != "gpu"])  # which takes minutes
        words.append(kind)
        parser = kinds.choices[kind]
    chances = {"finetune": 0.08, "plan": 0.12}.get(command, 0.25)
    needed = {"finetune": ("model", "--data", "--max-steps", "--device"), "plan": ("model",), "kernels": ("--arch",)}
    for action in actions_of(parser):
        names = [name for name in action.option_strings if name not in SLOW] or [action.dest]
        if any(name in SLOW for name in action.option_strings):
            continue
        name = rng.choice(names)
        if rng.random() > (0.9 if name in needed.get(command, ()) else chances):
            continue
        words += [name] if action.option_strings else []
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            continue
        words += [value_of(rng, name, action) for _ in range(action.nargs if isinstance(action.nargs, int) else 1)]
    if rng.random() < 0.15:
        words.insert(rng.randrange(1, len(words) + 1), rng.choice((*WORDS, "--no-such-option")))
    return words


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def case(seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=BASE) as name:
        here = Path(name)
        work, temporary = here / "work", here / "tmp"
        work.mkdir()
        temporary.mkdir()
        for path in (BASE / "files").iterdir():
            (work / path.name).symlink_to(path) if path.is_dir() else (work / path.name).write_bytes(path.read_bytes())
        words = command_line(rng)
        try:
            _run(rng, words, work, temporary)
        except Fault as fault:
            raise Fault(f"{fault}\n    cruxy-triton {' '.join(map(repr, words))[:400]}") from fault


def _end_of(group: int) -> bool:
    """Whether processes of this group are there three seconds later; they are ended then."""
    for _ in range(30):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    return True


def _run(rng: random.Random, words: list[str], work: Path, temporary: Path) -> None:
    if any("\0" in word for word in words):
        return
    before = files_in(work)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CRUXY_CACHE": str(work.parent / "cache"),
        "TMPDIR": str(temporary),
    }
    patience = rng.choice((rng.uniform(0.7, 12), 30, 30, 30))
    number = rng.choice((signal.SIGINT, signal.SIGINT, signal.SIGTERM))
    deaf = rng.random() < 0.05
    out, err = work.parent / "stdout", work.parent / "stderr"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "cruxy_triton", *words], cwd=work, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if deaf else stdout, stderr=stderr, start_new_session=True,
        )  # fmt: skip
    if process.stdout is not None:
        process.stdout.close()
    sent = False
    try:
        code = process.wait(patience)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        sent = True
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            raise Fault(f"still running 60 s after {number.name}") from None
    finally:
        orphans = _end_of(process.pid)
    said = err.read_text(encoding="utf-8", errors="replace")
    if orphans:
        raise Fault(f"processes left behind, {number.name if sent else 'by itself'}")
    allowed = (*CODES, -number) if sent and number == signal.SIGTERM else CODES
    how = f"{number.name} after {patience:.1f} s" if sent else "reader gone" if deaf else "by itself"
    if code not in allowed:
        raise Fault(f"exit code {code}, {how}: {said[-300:]!r}")
    if "Traceback (most recent call last)" in said or "Exception ignored" in said:
        raise Fault(f"a traceback, {how}: {said[-500:]!r}")
    if (left := files_in(temporary)) and code != -number:  # killed outright
        raise Fault(f"temporary files left, exit code {code}, {how}: {sorted(left)[:5]}")
    new = files_in(work) - before
    odd = sorted(path for path in new if Path(path).name.startswith(".") and not Path(path).name.startswith(".lock"))
    if odd and code != -number:
        raise Fault(f"hidden files left, exit code {code}, {how}: {odd[:5]}")
    if code == 2 and not sent:
        errors = [line for line in said.splitlines() if ": error: " in line]
        if len(errors) != 1 or len(errors[0]) < 30:
            raise Fault(f"exit code 2 with {len(errors)} sentences: {said[-400:]!r}")
        if new:
            raise Fault(f"exit code 2 and new files: {sorted(new)[:5]}")
    if code == 1 and ("Error:" in said or "Error (" in said) and "cruxy-triton" in said and not sent:
        raise Fault(f"an unforeseen error: {said.strip().splitlines()[-1][:400]!r}")


if __name__ == "__main__":
    prepare(BASE / "files")
    try:
        soak(case)
    finally:
        import shutil

        shutil.rmtree(BASE, ignore_errors=True)
