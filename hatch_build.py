"""Give PyPI's page a README whose links lead to the repository, once that has an address.

    KDCACHE_REPOSITORY=https://HOST/OWNER/kdcache python -m build

Without the variable, as in an installation from the clone, there are no URLs and README.md stays as it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Links(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        repository = os.environ.get("KDCACHE_REPOSITORY", "").rstrip("/")
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if repository:
            metadata["urls"] = {"Repository": repository, "Documentation": f"{repository}/tree/HEAD/docs"}
            readme = absolute(readme, repository)
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}


def absolute(readme: str, repository: str) -> str:
    """Put the address of the repository before the links to its files."""
    images = re.sub(r"(!\[[^\]]*\])\((?!https?:|#)([^)]+)\)", rf"\1({repository}/raw/HEAD/\2)", readme)
    return re.sub(r"(?<!!)(\[[^\]]*\])\((?!https?:|#)([^)]+)\)", rf"\1({repository}/blob/HEAD/\2)", images)
