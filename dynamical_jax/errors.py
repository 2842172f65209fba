"""Errors that are explained to the user in one line."""


class UserError(ValueError):
    """Input of the user cannot be used; the message says which, and what would be right.

    Binaries print the message as one line and exit with status 1, without a traceback.
    """


class DivergedError(UserError):
    """Training produced a loss that is not finite."""


def describe(error: OSError) -> str:
    """Returns what the system refused, and why, in one line."""
    return f"cannot use {error.filename}: {error.strerror}"


def reason(error: BaseException) -> str:
    """Returns why something failed, in one line, without the file that a message names itself.

    >>> reason(FileNotFoundError(2, "No such file or directory", "features.npz"))
    'No such file or directory'
    """
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.partition("\n")[0]
