"""The ranges of numbers on the command line. Every check is written so that NaN fails it."""

from __future__ import annotations

from kdcache.errors import UsageError

LARGEST = 2**31 - 1  # counts are stored in columns of 32 bits
MOST_SAMPLES = 65_536  # answers per prompt; each is an entry of the plan
MOST_SEED = 2**32 - 1  # vLLM seeds numpy, which accepts 32 bits


def check_whole(flag: str, value: int | None, least: int, most: int = LARGEST) -> None:
    """UsageError if a value is given and not from ``least`` to ``most``."""
    if value is not None and not least <= value <= most:
        raise UsageError(f"{flag} {value}: expected a whole number from {least} to {most}")


def check_sampling(temperature: float, top_p: float | None) -> None:
    """UsageError for values that engines refuse late or change silently, as vLLM does with temperatures below 0.01."""
    if temperature != 0 and not 0.01 <= temperature <= 100:
        raise UsageError(f"--temperature {temperature}: expected 0 (greedy), or a number from 0.01 to 100")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p}: expected a number above 0 and at most 1")
