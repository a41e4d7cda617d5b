"""quartic8 in float64: levels 0 to 255 of value s (q / 255)⁴, drawn like softsign4's, and 0 for 0 alone."""

import numpy as np
from softsign8 import LIMIT, scale  # noqa: F401

BITS, LEVELS = 8, 255
BYTES_PER_VALUE = 1 + 2 / 64
SIGNED = False
TINY = 2e-4  # what fp32 may move the share by: its x is off by 255 · 2^-24 and more
VALUES = (np.arange(LEVELS + 1) / LEVELS) ** 4


def unpack(stored, numel):
    return stored.reshape(-1)


def value(codes, s):
    return s * (codes / LEVELS) ** 4


def _around(magnitude, s):
    x = np.asarray(np.minimum(magnitude / s, 1.0))
    low = np.clip(np.searchsorted(VALUES, x, side="right") - 1, 0, LEVELS - 1)
    return low, (x - VALUES[low]) / (VALUES[low + 1] - VALUES[low]), VALUES[low + 1] - VALUES[low]


def codes(magnitude, s, random=None):
    """(lowest, highest) code that a value may have."""
    low, share, _ = _around(magnitude, s)
    threshold = 0.5 if random is None else ((random >> np.uint64(16)).astype(float) + 1) / 2**16
    least = np.asarray(magnitude) > 0
    return np.maximum(low + (share - TINY > threshold), least), np.maximum(low + (share + TINY >= threshold), least)


def error(m, s):
    """How far from v its nearest code may be; what is below the first code takes that."""
    low, _, gap = _around(np.abs(m), s)
    return s * gap * np.where(low == 0, 1.0, 0.5) * 1.001 + np.maximum(np.abs(m) - s, 0)
