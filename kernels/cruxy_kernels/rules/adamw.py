"""AdamW (arXiv 1711.05101), by default with Nesterov momentum as the Cruxy SDK has it.

    g <- g + weight_decay p                          unless decoupled
    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g²
    n = beta1 m + (1 - beta1) g                      if nesterov, else m
    p <- p (1 - lr weight_decay) - multiplier lr √(1 - beta2^t) / (1 - beta1^t) n / (√v + eps)

g is the gradient times GRAD_FACTOR of the control vector. eps stands where the SDK has it: beside √v, before the
bias correction. Both moments are fp32, or 8 bits of a codec of their own each (codec.py). 16-bit floating point they
cannot be: in bfloat16 the second one's relative step 1 - beta2 = .001 is below half an ulp and would be lost, in fp16
small squares would underflow.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
from torch import Tensor

from .._triton import HAS_TRITON
from .rule import Rule


def adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, c: Any, multiplier: Any = 1.0, *, nesterov: bool, decoupled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification: new parameter and moments of whole tensors; `c` has the control row's values by name."""
    if not decoupled:
        g = g + c.weight_decay * p
    m = c.beta1 * m + (1 - c.beta1) * g
    v = c.beta2 * v + (1 - c.beta2) * g * g
    n = c.beta1 * m + (1 - c.beta1) * g if nesterov else m
    step = c.lr * c.correction2_sqrt / c.correction1 * multiplier
    return p * (1 - c.lr * c.weight_decay * decoupled) - step * (n / (v.sqrt() + c.eps)), m, v


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def adamw_kernel(
        p, g, m, v, lr, weight_decay, beta1, beta2, eps, correction1, correction2_sqrt, multiplier, FLAGS: tl.constexpr
    ):
        NESTEROV: tl.constexpr = FLAGS % 2 == 1
        DECOUPLED: tl.constexpr = FLAGS // 2 == 1
        # Before the elements: behind them its parts cost registers that sm_75 does not have.
        step = lr * correction2_sqrt / correction1 * multiplier
        keep = 1.0
        if DECOUPLED:
            keep = 1 - lr * weight_decay
        else:
            g = g + weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        n = m
        if NESTEROV:
            n = beta1 * m + (1 - beta1) * g
        p = p * keep - step * (n / (tl.sqrt(v) + eps))
        return p, m, v

    KERNEL = adamw_kernel
else:
    KERNEL = None

ADAMW = Rule(
    name="adamw",
    state=("exp_avg", "exp_avg_sq"),
    storage=(torch.float32,),
    state_bits={32: ("plain", "plain"), 8: ("softsign8", "quartic8")},
    flags={"nesterov": True, "decoupled": True},
    betas=(0.9, 0.999),
    ages=True,
    specification=adamw,
    kernel=KERNEL,
)
