"""softsign8 in float64, from its formula: q = sign(m) ⌊127 · 4|m| / (s + 3|m|) + ½⌋ and m = s q / (127 · 4 - 3|q|)."""

import numpy as np

BITS, LEVELS = 8, 127
BYTES_PER_VALUE = 1 + 2 / 64
LIMIT = 2.0**-134  # blocks whose largest magnitude is not above this are kept as zeros
TINY = 1e-4  # what fp32 may move the level by


def scale(largest):
    """The nearest bfloat16 of each, ties to even, no further than the largest finite one; inf and NaN stay."""
    usable = np.where(np.isfinite(largest), largest, 1.0)
    unit = np.exp2(np.maximum(np.frexp(usable)[1] - 8, -133))  # 8 significant bits; the smallest subnormal is 2^-133
    rounded = np.minimum(np.round(usable / unit) * unit, 255 * 2.0**120)
    return np.where(np.isfinite(largest), rounded, largest)


def unpack(stored, numel):
    """Codes, 1-D, of the stored tensor as float64."""
    return stored.reshape(-1)


def codes(magnitude, s, random=None):
    """(lowest, highest) magnitude of the code that m may have; s broadcasts against m. random: not used."""
    level = np.minimum(LEVELS * 4 * magnitude / (s + 3 * magnitude), LEVELS)
    return np.ceil(level - 0.5 - TINY), np.floor(level + 0.5 + TINY)


def value(codes, s):
    return s * codes / (LEVELS * 4 - 3 * np.abs(codes))


def error(m, s):
    """How far from m its code may be: half a step of the code there (its slope grows by up to 1.3 % on the way), and
    the cut of what is above s."""
    x = np.minimum(np.abs(m) / s, 1)
    return s * (1 + 3 * x) ** 2 / (2 * LEVELS * 4) * 1.013 + np.maximum(np.abs(m) - s, 0)
