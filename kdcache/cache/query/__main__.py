"""Print docs/sql.md, which is generated from the headers of sql/.

python -m kdcache.cache.query > docs/sql.md
"""

from __future__ import annotations

import sys

from kdcache.cache.query.document import document

if __name__ == "__main__":
    sys.stdout.write(document())
