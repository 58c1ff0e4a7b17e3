"""One short file per data set."""
