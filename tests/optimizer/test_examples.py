"""The examples of the optimizer run as they are; each ends with code 0 only if what it shows is true."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


NEEDS = {"hf_trainer.py": "transformers", "accelerate_loop.py": "accelerate", "lightning_loop.py": "lightning"}


@pytest.mark.parametrize("name", ["training_loop.py", *NEEDS])
def test_example(name, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loss" in done.stdout
