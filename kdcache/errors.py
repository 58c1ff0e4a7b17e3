"""The one exception that users see as a sentence instead of a traceback."""


class KDError(Exception):
    """What happened, what was expected, and what to do, in a sentence or two.

    ``exit_code`` is the process's: 1 failed, 2 wrong usage, 3 bad shards found.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(KDError):
    """The command line or an input file asks for something that cannot be (exit 2)."""

    def __init__(self, message: str):
        super().__init__(message, exit_code=2)


class Unstoppable(BaseException):
    """Ctrl-C came, and a library does not react to it: only the end of the process ends its thread.

    No KeyboardInterrupt, after which a program may go on.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception that says something, else its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
