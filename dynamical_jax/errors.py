"""Errors that one line can explain."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, and what would be right.

    Binaries print the message as one line and exit with status 1, without a traceback.
    """


class DivergedError(UserError):
    """Training produced a loss that is not finite."""
