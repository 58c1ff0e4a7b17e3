"""`kd` and `python -m kdcache`: run cli.py, after checking that `cli` and `trainer` are this program's own modules.

Others use these two names as well: a user may have a cli.py, and a package on PyPI (Coqui's) has a `trainer` that pip
installs over ours. Run by its path, with Python's -P, this file works in any folder and imports nothing from it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Run the `kd` command."""
    if str(ROOT) not in sys.path:  # a checkout, run by path
        sys.path.insert(0, str(ROOT))
    for name in ("cli", "trainer"):
        if problem := import_problem(name):
            sys.exit(f"Error: {problem}")
    import cli

    cli.main()


def import_problem(name: str) -> str | None:
    """Say why `import name` would import another module than this program's; None if it would not."""
    spec = importlib.util.find_spec(name)
    origin = Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None
    if origin is None or not origin.is_relative_to(ROOT):
        return (
            f"`import {name}` finds {origin or 'nothing'} instead of kdcache's own in {ROOT}. Run `kd` (or `python -P "
            "-m kdcache`) without that folder on PYTHONPATH, or install kdcache where no other package has that name"
        )
    if "kdcache" not in origin.read_text(encoding="utf-8"):
        return (
            f"{origin} was written by another package, whose `{name}` replaced kdcache's. The two cannot be in one "
            "environment: install kdcache into another one"
        )
    return None


if __name__ == "__main__":
    main()
