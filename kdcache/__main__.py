"""The entry of `kd` and of `python -m kdcache`: runs cli.py, after checking that `cli` and `trainer` are this program's.

Both names are used by others too: users have a cli.py of their own, and PyPI has a package (Coqui's) whose `trainer` pip
installs over this one. Run by its path and with Python's -P, this file works in any folder and imports nothing from it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Run `kd`."""
    if str(ROOT) not in sys.path:  # this is a checkout, and this file was run by its path
        sys.path.insert(0, str(ROOT))
    for name in ("cli", "trainer"):
        if problem := in_the_way(name):
            sys.exit(f"Error: {problem}")
    import cli

    cli.main()


def in_the_way(name: str) -> str | None:
    """Return why `import name` would not import this program's own module; None if it would."""
    spec = importlib.util.find_spec(name)
    origin = Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None
    if origin is None or not origin.is_relative_to(ROOT):
        return (
            f"`import {name}` finds {origin or 'nothing'} instead of kdcache's own in {ROOT}. Run `kd` (or `python -P -m kdcache`) "
            "without that folder on PYTHONPATH, or install kdcache in an environment where no other package has that name"
        )
    if "kdcache" not in origin.read_text(encoding="utf-8"):
        return (
            f"{origin} was written by another package, whose `{name}` replaced kdcache's. The two cannot share an environment: "
            "install kdcache into one of its own"
        )
    return None


if __name__ == "__main__":
    main()
