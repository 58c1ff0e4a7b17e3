"""What `kd` is, and `python -m kdcache`: cli.py, once it is clear that the modules it stands on are this program's own.

`cli` and `trainer` are names that others use: a cli.py of the user's, and a package of PyPI (Coqui's) whose `trainer` pip
installs over ours. Run by its path, under Python's -P, this file is found from any folder and finds nothing of that folder.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """The `kd` command."""
    if str(ROOT) not in sys.path:  # a checkout, run by path
        sys.path.insert(0, str(ROOT))
    for name in ("cli", "trainer"):
        if problem := in_the_way(name):
            sys.exit(f"Error: {problem}")
    import cli

    cli.main()


def in_the_way(name: str) -> str | None:
    """Why `import name` would not give this program's own module; None if it would."""
    spec = importlib.util.find_spec(name)
    origin = Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None
    if origin is None or not origin.is_relative_to(ROOT):
        return (
            f"`import {name}` finds {origin or 'nothing'} instead of kdcache's own in {ROOT}. Run `kd` (or `python -P -m kdcache`) "
            "without that folder on PYTHONPATH, or install kdcache where no other package has that name"
        )
    if "kdcache" not in origin.read_text(encoding="utf-8"):
        return (
            f"{origin} was written by another package, whose `{name}` took the place of kdcache's. The two cannot be in one "
            "environment: install kdcache into one of its own"
        )
    return None


if __name__ == "__main__":
    main()
