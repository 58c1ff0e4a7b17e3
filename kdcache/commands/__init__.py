"""One file per command of phase one and of the cache, and what all commands share. cli.py has the list of commands."""
