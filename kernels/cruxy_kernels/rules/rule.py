"""What an update rule consists of. A rule is one file of this folder, and a line in `rules/__init__.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """One update rule.

    state: names of its state buffers, at most two.
    storage: floating-point dtypes that a buffer may have (float64 beside them, with float64 parameters).
    state_bits: the codecs (codec.CODECS) that all of its buffers may be kept in.
    betas: its usual coefficients.
    ages: whether it reads the bias corrections, so that a tensor's age matters.
    flags: names of its switches and their defaults; the kernel gets them as the bits of FLAGS, first name lowest.
    specification: (p, g, *state, c, multiplier, **flags) -> (p, *state), whole fp32 or fp64 tensors, any shape;
        c has lr, weight_decay, beta1, beta2, eps, correction1 and correction2_sqrt as 0-dim tensors.
    kernel: the same in Triton on fp32 values: (p, g, *state, lr, weight_decay, beta1, beta2, eps, correction1,
        correction2_sqrt, multiplier, FLAGS) -> (p, *state).
    """

    name: str
    state: tuple[str, ...]
    storage: tuple[torch.dtype, ...]
    state_bits: tuple[int, ...]
    betas: tuple[float, float]
    ages: bool
    specification: Callable[..., tuple[Tensor, ...]]
    kernel: Any
    flags: Mapping[str, bool] = field(default_factory=dict)

    def bits(self, given: Mapping[str, bool]) -> int:
        """The switches as a number for the kernel; TypeError for one that the rule does not have."""
        if odd := sorted(set(given) - set(self.flags)):
            raise TypeError(f"{self.name} has no flag {', '.join(odd)}; it has {', '.join(self.flags) or 'none'}")
        return sum(bool(given.get(name, default)) << i for i, (name, default) in enumerate(self.flags.items()))
