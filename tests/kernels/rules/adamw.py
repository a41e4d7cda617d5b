"""AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), with or without Nesterov and decoupling.

eps stands beside the root of the second moment before its bias correction, as the PyPI package cruxy 2.1.0 has it.
"""

import numpy as np
from torch.optim import AdamW

STATE = ["exp_avg", "exp_avg_sq"]
FLAGS = {"nesterov": True, "decoupled": True}
STORAGE = ["float32", 8]


def formula(p, g, state, c, multiplier, flags):
    """name -> (float64 value, magnitude that rounding errors are relative to), and which parameters are decided."""
    m, v = state
    shrunk = p * (1 - c.lr * c.weight_decay) if flags["decoupled"] else p
    decay = 0 if flags["decoupled"] else c.weight_decay
    g = g + decay * p
    m_new = m + (1 - c.beta1) * (g - m)
    v_new = v + (1 - c.beta2) * (g * g - v)
    direction = m_new + (1 - c.beta1) * (g - m_new) if flags["nesterov"] else m_new
    root = np.sqrt(v_new) + c.eps
    step = multiplier * c.lr * c.correction2_sqrt / c.correction1
    return {
        "param": (shrunk - step * direction / root, np.abs(p) + 2 * step * (np.abs(m) + np.abs(g)) / root),
        "exp_avg": (m_new, np.abs(m) + np.abs(g) + decay * np.abs(p)),
        "exp_avg_sq": (v_new, v + 2 * g * g + decay * np.abs(p * g)),
    }, np.ones(p.shape, dtype=bool)


def peer(params, lr, betas, weight_decay):
    """An optimizer by somebody else, with the flags under which it is the same rule."""
    return AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay, eps=1e-20), {"nesterov": False}
