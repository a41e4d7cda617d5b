"""softsign4 in float64: levels -7 to 7 of value s q / (7 · 4 - 3|q|), two in a byte, the first in the lower half.

Of the two levels around a value it takes the upper one where the value's share of their distance exceeds a threshold:
(the upper 16 of its random bits + 1) / 2^16, or ½.
"""

import numpy as np
from softsign8 import LIMIT, scale  # noqa: F401

BITS, LEVELS = 4, 7
BYTES_PER_VALUE = 1 / 2 + 2 / 64
TINY = 1e-5  # what fp32 may move the share by


def unpack(stored, numel):
    """Codes, 1-D, of the stored tensor (bytes as float64)."""
    halves = np.stack([stored % 16, stored // 16], axis=1).reshape(-1)[:numel]
    return np.where(halves < 8, halves, halves - 16)


def value(codes, s):
    return s * codes / (LEVELS * 4 - 3 * np.abs(codes))


def codes(magnitude, s, random=None):
    """(lowest, highest) magnitude of the code that m may have."""
    x = np.asarray(np.minimum(magnitude / s, 1.0))
    values = value(np.arange(LEVELS + 1), 1.0)
    low = np.clip(np.searchsorted(values, x, side="right") - 1, 0, LEVELS - 1)
    share = (x - values[low]) / (values[low + 1] - values[low])
    threshold = 0.5 if random is None else ((random >> np.uint64(16)).astype(float) + 1) / 2**16
    return low + (share - TINY > threshold), low + (share + TINY >= threshold)


def error(m, s):
    """How far from m its nearest code may be: half the distance of the two around it, and what is above s."""
    values = value(np.arange(LEVELS + 1), 1.0)
    x = np.asarray(np.minimum(np.abs(m) / s, 1.0))
    low = np.clip(np.searchsorted(values, x, side="right") - 1, 0, LEVELS - 1)
    return s * (values[low + 1] - values[low]) * 0.5001 + np.maximum(np.abs(m) - s, 0)
