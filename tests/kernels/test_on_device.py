"""Runs the tests of the kernels in Triton's interpreter, each file in a process of its own; see conftest.py.

Where a CUDA device is at hand pytest collects those files itself and runs them on it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = [
    file
    for file in sorted(Path(__file__).parent.glob("test_*.py"))
    if file.name.startswith("test_triton_") or re.search(r"^def test_\w+\(place\b", file.read_text(), re.MULTILINE)
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="collected directly, on the GPU")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_interpreter(file: Path, request: pytest.FixtureRequest) -> None:
    root = Path(__file__).parents[2]
    marks = request.config.getoption("-m")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", str(marks), "-n", "0", "-p", "no:cacheprovider", str(file)],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    nothing_chosen = 5  # by this -m
    assert result.returncode in (0, nothing_chosen), result.stdout[-6000:] + result.stderr[-2000:]
    if marks == "not slow":
        assert result.returncode == 0
