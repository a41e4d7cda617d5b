"""Lion, the Cruxy white paper's eq 11-13: a sign update with one state buffer.

    u = sign(beta1 m + (1 - beta1) g)
    p <- p - lr (multiplier u + weight_decay p)
    m <- beta2 m + (1 - beta2) g

g is the gradient times GRAD_FACTOR of the control vector: unscaled, clipped, signed. The momentum m may be kept in
fp32, 16 bits, or 8 or 4 bits of a codec: its errors matter only where they turn a sign.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
from torch import Tensor

from .._triton import HAS_TRITON
from .rule import Rule


def lion(p: Tensor, g: Tensor, m: Tensor, c: Any, multiplier: Any = 1.0) -> tuple[Tensor, Tensor]:
    """The specification: new parameter and momentum of whole tensors; `c` has the control row's values by name."""
    u = torch.sign(c.beta1 * m + (1 - c.beta1) * g)
    p = p * (1 - c.lr * c.weight_decay) - c.lr * multiplier * u
    return p, c.beta2 * m + (1 - c.beta2) * g


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def lion_kernel(
        p, g, m, lr, weight_decay, beta1, beta2, eps, correction1, correction2_sqrt, multiplier, FLAGS: tl.constexpr
    ):
        u = beta1 * m + (1 - beta1) * g
        sign = tl.where(u > 0, 1.0, tl.where(u < 0, -1.0, 0.0))
        p = p * (1 - lr * weight_decay) - lr * multiplier * sign
        m = beta2 * m + (1 - beta2) * g
        return p, m

    KERNEL = lion_kernel
else:
    KERNEL = None

LION = Rule(
    name="lion",
    state=("exp_avg",),
    storage=(torch.float32, torch.float16, torch.bfloat16),
    state_bits={32: ("plain",), 8: ("softsign8",), 4: ("softsign4",)},
    betas=(0.9, 0.99),
    ages=False,
    specification=lion,
    kernel=KERNEL,
)
