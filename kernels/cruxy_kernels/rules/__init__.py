"""The update rules by name."""

from torch import Tensor

from ..codec import PLAIN, Codec
from .adamw import ADAMW
from .lion import LION
from .rule import Rule

RULES: dict[str, Rule] = {rule.name: rule for rule in (LION, ADAMW)}


def codec_of(buffer: str, codes: Tensor) -> Codec:
    """The codec, of those that some rule keeps this buffer in, whose codes have this dtype; else the plain one."""
    for rule in RULES.values():
        for bits in rule.state_bits:
            for name, codec in zip(rule.state, rule.codecs(bits), strict=True):
                if name == buffer and codec.block and codec.dtype == codes.dtype:
                    return codec
    return PLAIN
