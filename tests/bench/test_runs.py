"""A grid that is interrupted or killed ends at once, without waiting for the runs that have begun; no process stays."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLEEPER = """
import os, signal, sys, time
from dataclasses import dataclass
from cruxy_triton.bench.characters import Size
from cruxy_triton.bench.runs import Runs

@dataclass(frozen=True)
class Cell:
    number: int
    def key(self):
        return self.number

def sleep(cell):
    with open("pids", "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(300)
    return cell

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    list(Runs(Cell, Size(), None).play(sleep, map(Cell, range(5)), 2))
"""


def alive(pid: int) -> bool:
    """A zombie, whose parent has not asked for it yet, is not."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="/proc says which processes live")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_no_process_stays(tmp_path, number):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    process = subprocess.Popen([sys.executable, "sleeper.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    pids, until = tmp_path / "pids", time.monotonic() + 120
    while (
        process.poll() is None
        and not (pids.exists() and len(pids.read_text().split()) == 2)
        and time.monotonic() < until
    ):
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(60)
    until = time.monotonic() + (60 if number == signal.SIGKILL else 0)
    while any(alive(int(pid)) for pid in pids.read_text().split()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(alive(int(pid)) for pid in pids.read_text().split())
    assert number == signal.SIGKILL or "KeyboardInterrupt" in process.communicate(timeout=60)[1]
