"""Random calls, settings, files and signals, for minutes: `CRUXY_SOAK_MINUTES=10 pytest -m soak` (each of five).

Each soak is a process of its own, because a fault may end it. What fails is printed with the seed that repeats it:
`python tests/soak/soak_kernels.py --seed N --backend native`.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]
SOAKS = {
    "kernels torch": ("soak_kernels.py", "--backend", "torch"),
    "kernels native": ("soak_kernels.py", "--backend", "native"),
    "kernels triton": ("soak_kernels.py", "--backend", "triton"),
    "optimizer": ("soak_optimizer.py",),
    "commands": ("soak_commands.py",),
}


@pytest.mark.parametrize("name", list(SOAKS))
def test_soak(name: str, tmp_path: Path) -> None:
    minutes = os.environ.get("CRUXY_SOAK_MINUTES", "3")
    start = os.environ.get("CRUXY_SOAK_START", str(random.SystemRandom().randrange(1 << 30)))
    script, *words = SOAKS[name]
    extra = {"TRITON_INTERPRET": "1"} if "triton" in words else {}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *words, "--minutes", minutes, "--start", start],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", **extra},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    seed = (tmp_path / "seed.txt").read_text()
    assert done.returncode == 0, f"exit code {done.returncode}, last seed {seed}{done.stdout[-6000:]}"
    print(done.stdout[-300:])  # noqa: T201 (how many cases it were, with -s)
