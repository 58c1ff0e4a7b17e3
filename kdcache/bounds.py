"""Which numbers a command line may ask for. NaN is in no range, and every check is written so that it fails there."""

from __future__ import annotations

from kdcache.errors import UsageError

LARGEST = 2**31 - 1  # counts end up in columns of 32 bits
MOST_SAMPLES = 65_536  # answers to one prompt, which are planned one by one
MOST_SEED = 2**32 - 1  # numpy, which vLLM seeds, takes 32 bits


def check_whole(flag: str, value: int | None, least: int, most: int = LARGEST) -> None:
    if value is not None and not least <= value <= most:
        raise UsageError(f"{flag} {value}: expected a whole number from {least} to {most}")


def check_sampling(temperature: float, top_p: float | None) -> None:
    """UsageError for what engines would refuse late, or change in silence as vLLM does with temperatures below 0.01."""
    if temperature != 0 and not 0.01 <= temperature <= 100:
        raise UsageError(f"--temperature {temperature}: expected 0 (greedy), or a number from 0.01 to 100")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p}: expected a number above 0 and at most 1")
