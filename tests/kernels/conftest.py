"""Where the tests of the kernels run, and what they share.

A test that takes `place` runs on every backend of this process: PyTorch and the compiled loops on the CPU, the kernels
on a CUDA device where there is one. The interpreter of Triton has to be chosen before it is imported: test_on_device.py
runs the files that take `place` once more under TRITON_INTERPRET=1, each in a process of its own: there `place` is the
interpreter. Files called test_triton_*.py are about the kernels alone and are collected only where those run.
"""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cruxy_kernels import launch
from cruxy_kernels import layout as L
from cruxy_kernels.backends import native

sys.path.insert(0, str(Path(__file__).parent))

from cases import CUDA, INTERPRETED, PLACES, Place

collect_ignore_glob = [] if INTERPRETED or CUDA else ["test_triton_*.py"]


@pytest.fixture(params=PLACES, ids="-".join)
def place(request: pytest.FixtureRequest) -> Place:
    if request.param.backend == "native" and native.library()[0] is None:
        pytest.skip(native.library()[1])
    return request.param


@pytest.fixture
def device() -> str:
    """The device of the Triton kernels, for test_triton_*.py."""
    return "cuda" if CUDA else "cpu"


@pytest.fixture
def started() -> Iterator[list[str]]:
    """The names of the kernels that the test starts."""
    names: list[str] = []

    def note(name: str) -> None:
        names.append(name)

    launch.observers.append(note)
    yield names
    launch.observers.remove(note)


@pytest.fixture
def control_rows() -> Callable[..., torch.Tensor]:
    """control_rows(n, device=, **slots): a control vector whose outputs are as a step might leave them."""

    def make(rows: int = 1, *, device: str = "cpu", **slots: float) -> torch.Tensor:
        control = torch.zeros((rows, L.NUM_SLOTS))
        values = {
            "LR": 1e-3, "WEIGHT_DECAY": 0.1, "BETA1": 0.9, "BETA2": 0.99, "EPS": 1e-8, "GAMMA": 1.5,
            "META_LR_ETA": 0.05, "META_LR_BETA2": 0.03, "META_INTERVAL": 10.0, "SCALE_MIN": 0.1, "SCALE_MAX": 4.0,
            "LR_MIN": -math.inf, "LR_MAX": math.inf, "GUARD": 1.0, "SEED": 11.0, "LR_SCALE": 1.0, "META_BETA2": 0.99,
            "STEP": 3.0, "LR_OUT": 7e-4, "BETA1_OUT": 0.91, "BETA2_OUT": 0.97, "CLIP_COEF": 0.6, "GRAD_FACTOR": 0.6,
            "BIAS_CORRECTION1": 1 - 0.91**3, "BIAS_CORRECTION2_SQRT": math.sqrt(1 - 0.97**3),
        }  # fmt: skip
        for name, value in {**values, **slots}.items():
            control[:, getattr(L, name)] = value
        return control.to(device)

    return make
