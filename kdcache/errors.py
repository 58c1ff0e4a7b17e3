"""The exceptions that users see as a sentence instead of a traceback."""


class KDError(Exception):
    """An error whose message says in a sentence or two what happened, what was expected, and what to do.

    ``exit_code`` is that of the process: 1 failed, 2 wrong usage, 3 bad shards found, 130 interrupted.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(KDError):
    """The command line or an input file asks for something impossible (exit code 2)."""

    def __init__(self, message: str):
        super().__init__(message, exit_code=2)


class Unstoppable(BaseException):
    """Ctrl-C was pressed, and a library does not react to it: only the end of the process ends its thread.

    This is no KeyboardInterrupt, because a program may catch that and continue.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message that is not empty; without one, the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
