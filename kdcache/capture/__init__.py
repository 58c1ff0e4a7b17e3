"""Phase one: run the teacher over the examples and write what it says into a cache."""
