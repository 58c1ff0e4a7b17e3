"""One file per command of phase two; cli.py says which there are."""
