"""Where tests run (conftest.py), and the rules and codecs they know: each is a file of data, read by the runners.

The oracles are numpy in float64. What a kernel may be off: the roundings of fp32 times the magnitude of the terms.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from cruxy_kernels import layout as L

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED


class Place(NamedTuple):
    """A backend, and the device of its tensors."""

    backend: str
    device: str


PLACES = [Place("triton", "cpu")] if INTERPRETED else [Place("torch", "cpu"), Place("native", "cpu")]
PLACES += [Place("triton", "cuda"), Place("torch", "cuda")] if CUDA else []

# A sum takes a few fp32 roundings (6e-8 each) of its terms.
ROUNDINGS = 3e-7


def read(folder: str) -> dict[str, ModuleType]:
    found = {}
    sys.path.insert(0, str(Path(__file__).parent / folder))  # a case may take over what it shares with another one
    for path in sorted((Path(__file__).parent / folder).glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"{folder}_{path.stem}", path)
        found[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[path.stem])
    return found


RULE_CASES = read("rules")
CODEC_CASES = read("codecs")


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float64, copy=True).numpy()


def row_values(control: torch.Tensor, row: int) -> SimpleNamespace:
    """What a rule reads of a control row, as Python floats."""
    slots = {
        "factor": L.GRAD_FACTOR, "lr": L.LR_OUT, "weight_decay": L.WEIGHT_DECAY, "beta1": L.BETA1_OUT,
        "beta2": L.BETA2_OUT, "eps": L.EPS, "correction1": L.BIAS_CORRECTION1,
        "correction2_sqrt": L.BIAS_CORRECTION2_SQRT, "seed": L.SEED, "step": L.STEP,
    }  # fmt: skip
    return SimpleNamespace(**{name: control[row, slot].item() for name, slot in slots.items()})


# -- stochastic rounding, from its description in rounding.py, in whole numbers ------------------------------


def lowbias32(x: np.ndarray | int) -> np.ndarray:
    """Chris Wellons's hash (nullprogram.com/blog/2018/07/31), in 64 bits cut to 32."""
    x = np.asarray(x, dtype=np.uint64) & 0xFFFFFFFF
    for factor, shift in ((0x7FEB352D, 16), (0x846CA68B, 15)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & 0xFFFFFFFF
    return x ^ (x >> np.uint64(16))


def draws(seed: int, step: int, tensor: int, numel: int, start: int = 0) -> np.ndarray:
    """32 random bits for the elements start, start + 1, ... of a tensor."""
    key = int(lowbias32(step * 0x9E3779B9 + int(lowbias32(tensor + int(lowbias32(seed))))))
    element = np.arange(start, start + numel, dtype=np.uint64)
    return lowbias32((element & 0xFFFFFFFF) ^ lowbias32(key + (element >> np.uint64(32))))


def neighbours(values: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(magnitude of the neighbour towards 0, gap to the next one) in float16 or bfloat16."""
    bits, lowest, top = (11, -24, 65504.0) if dtype == torch.float16 else (8, -133, 255 * 2.0**120)
    magnitude = np.abs(values)
    gap = np.exp2(np.maximum(np.frexp(magnitude)[1] - bits, lowest).astype(float))
    return np.minimum(np.floor(magnitude / gap) * gap, top), gap


def rounded(values: np.ndarray, random: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Finite `values` up where the random share and the distance from the lower neighbour make a whole gap."""
    low, gap = neighbours(values, dtype)
    unit = 1 << (13 if dtype == torch.float16 else 16)
    share = np.floor((np.abs(values) - low) / gap * unit)
    top = 65504.0 if dtype == torch.float16 else 255 * 2.0**120
    up = share + (random.astype(np.int64) & (unit - 1)) >= unit
    return np.copysign(np.minimum(low + gap * up, top), values)
