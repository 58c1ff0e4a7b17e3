"""What the libraries say that users are not shown: each message by name, with the reason. All others reach them."""

from __future__ import annotations

import logging
import os
import re
import warnings

#: Progress bars are ours to show.
ENVIRONMENT = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}

#: (category, beginning of the message as a pattern, why it is hidden)
WARNINGS: tuple[tuple[type[Warning], str, str], ...] = ()

#: (logger, beginning of the message as a pattern, why it is hidden)
LOGGED: tuple[tuple[str, str, str], ...] = ()


class _Hide(logging.Filter):
    def __init__(self, pattern: str):
        super().__init__()
        self._pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._pattern.match(record.getMessage()) is None


def libraries() -> None:
    """Hide what is listed above, in this process. Called once, before the libraries are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for category, pattern, _ in WARNINGS:
        warnings.filterwarnings("ignore", pattern, category)
    for logger, pattern, _ in LOGGED:
        logging.getLogger(logger).addFilter(_Hide(pattern))
