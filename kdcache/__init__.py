"""kdcache: run the teacher once, distil as often as you like. Phase one and the cache; phase two is ``trainer``."""

__version__ = "0.1.0"
