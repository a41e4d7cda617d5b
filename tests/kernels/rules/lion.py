"""Lion as its paper has it (Chen et al., arXiv 2302.06675, algorithm 2), with a factor on the step, not the decay."""

import numpy as np
from lion_pytorch import Lion

STATE = ["exp_avg"]
FLAGS: dict[str, bool] = {}
STORAGE = ["float32", "float16", "bfloat16", 8, 4]  # dtypes and bits that its state may be kept in


def formula(p, g, state, c, multiplier, flags):
    """name -> (float64 value, magnitude that rounding errors are relative to), and which parameters are decided.

    A sign is undecided where the interpolation is within a few roundings of its terms.
    """
    (m,) = state
    interpolated = c.beta1 * m + (1 - c.beta1) * g
    update = c.lr * (multiplier * np.sign(interpolated) + c.weight_decay * p)
    decided = (np.abs(interpolated) > 1e-6 * (np.abs(m) + np.abs(g)) + 1e-30) | (interpolated == 0)
    return {
        "param": (p - update, np.abs(p) + c.lr * multiplier),
        "exp_avg": (c.beta2 * m + (1 - c.beta2) * g, np.abs(m) + np.abs(g)),
    }, decided


def peer(params, lr, betas, weight_decay):
    """An optimizer by somebody else, with the flags under which it is the same rule."""
    return Lion(params, lr=lr, betas=betas, weight_decay=weight_decay, decoupled_weight_decay=False), {}
