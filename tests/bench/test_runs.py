"""A grid that is interrupted ends at once: it does not wait for the runs that have begun, and leaves no process."""

import os
import signal
import subprocess
import sys
import time

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
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_interrupted(tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    process = subprocess.Popen([sys.executable, "sleeper.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    pids, until = tmp_path / "pids", time.monotonic() + 120
    while (
        process.poll() is None
        and not (pids.exists() and len(pids.read_text().split()) == 2)
        and time.monotonic() < until
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in said
    assert not any(alive(int(pid)) for pid in pids.read_text().split())
