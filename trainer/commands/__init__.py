"""One file per command of phase two. cli.py has the list of commands."""
