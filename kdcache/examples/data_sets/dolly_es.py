"""Dolly in Spanish: 15,015 rows translated and curated by Argilla (CC BY-SA 3.0).

    kd cache-teacher --examples dolly-es --prompt-format alpaca --out data/dolly-es

Rows that keep their English original share its problem, so that a row and its translation are in the same split.
"""

from __future__ import annotations

from kdcache.examples.data_sets import dolly
from kdcache.examples.dataset import DataSet

DATA_SETS = {
    "dolly-es": DataSet(
        "argilla/databricks-dolly-15k-curated-multilingual",
        dolly.LAYOUTS,
        dolly.take,
        split="es",
        within="es-*",
        language="es",
    )
}
