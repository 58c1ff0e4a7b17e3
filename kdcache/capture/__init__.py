"""Phase one: run the teacher over examples, and write its distributions into a cache. Start reading in ``run.py``."""
