"""The update rules by name."""

from .adamw import ADAMW
from .lion import LION
from .rule import Rule

RULES: dict[str, Rule] = {rule.name: rule for rule in (LION, ADAMW)}
