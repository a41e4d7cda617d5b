"""What a user is told: the exception that the command line turns into a sentence, and warnings at their own line."""

import sys
import warnings

# Packages whose frames lie between a user's line and ours.
_BETWEEN = {__name__.partition(".")[0], "torch", "accelerate", "transformers", "contextlib"}


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, what was expected and what to do."""


def warn(message: str) -> None:
    """Warn at the line of the user's program that led here, whatever wrapped the call on its way."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
