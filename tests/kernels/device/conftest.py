"""Tests of the Triton kernels: on a CUDA device where there is one, else in Triton's interpreter on the CPU.

The interpreter has to be chosen before triton is imported, so on a machine without a GPU these files are collected
under TRITON_INTERPRET=1 only; ../test_on_device.py runs them so, each in a process of its own.
"""

import math
import os

import pytest
import torch

from cruxy_kernels import layout as L

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def control_rows(device):
    """control_rows(n, **slots) -> control vector whose outputs are set as a step would leave them."""

    def make(rows: int = 1, **slots: float) -> torch.Tensor:
        control = torch.zeros((rows, L.NUM_SLOTS))
        values = {
            "LR": 1e-3, "WEIGHT_DECAY": 0.1, "BETA1": 0.9, "BETA2": 0.99, "EPS": 1e-8, "GAMMA": 1.5,
            "META_LR_ETA": 0.05, "META_LR_BETA2": 0.03, "META_INTERVAL": 10.0, "SCALE_MIN": 0.1, "SCALE_MAX": 4.0,
            "LR_MIN": -math.inf, "LR_MAX": math.inf, "GUARD": 1.0, "LR_SCALE": 1.0, "META_BETA2": 0.99,
            "STEP": 3.0, "LR_OUT": 7e-4, "BETA1_OUT": 0.91, "BETA2_OUT": 0.97, "CLIP_COEF": 0.6,
            "BIAS_CORRECTION1": 1 - 0.91**3, "BIAS_CORRECTION2_SQRT": math.sqrt(1 - 0.97**3),
        }  # fmt: skip
        for name, value in {**values, **slots}.items():
            control[:, getattr(L, name)] = value
        return control.to(device)

    return make
