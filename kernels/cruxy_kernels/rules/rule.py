"""What an update rule consists of. A rule is one file of this folder, and a line in `rules/__init__.py`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..codec import CODECS, Codec, scale_name


@dataclass(frozen=True)
class Rule:
    """One update rule.

    state: names of its state buffers, at most two.
    storage: floating-point dtypes that a buffer may have (float64 beside them, with float64 parameters).
    state_bits: the widths that its state may have, and for each the codec of every buffer by its name in CODECS.
        The codecs that one buffer may have differ in the dtype of their codes: by it a state is recognised. At most
        one codec of a width is rounded at random: it takes the half of the bits that the parameters leave.
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
    state_bits: Mapping[int, tuple[str, ...]]
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

    def codecs(self, bits: int) -> tuple[Codec, ...]:
        """The codec of each state buffer at a width."""
        return tuple(CODECS[name] for name in self.state_bits[bits])

    def codecs_of(self, state: Mapping[str, Sequence[Tensor]]) -> tuple[Codec, ...]:
        """The codec of each buffer of this state, by the first tensor's codes; TypeError where they are of none."""
        if scale_name(self.state[0]) not in state:
            return self.codecs(32)
        first = [state[name][0] for name in self.state]
        known = [self.codecs(bits) for bits in self.state_bits if bits != 32]
        for found in known:
            if [codec.dtype for codec in found] == [codes.dtype for codes in first]:
                return found
        given = ", ".join(f"{name}[0] is {codes.dtype}" for name, codes in zip(self.state, first, strict=True))
        raise TypeError(f"{given} with scales; {self.name} has no such codes")
