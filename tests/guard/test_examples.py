"""The examples of the guard run as they are; each ends with code 0 only if what it shows is true."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["guard_plain_loop.py", "guard_hf_trainer.py"])
def test_example(name, tmp_path):
    if name == "guard_hf_trainer.py":
        pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--tiny"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skip" in done.stdout
