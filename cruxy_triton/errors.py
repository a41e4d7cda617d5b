"""The one exception that the command line turns into a sentence instead of a traceback."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, what was expected and what to do."""
