"""bubblewrap's command line: what a program in the sandbox sees of the machine.

A program sees /usr read-only, a Python interpreter and a small /tmp of its own. It sees no network, no home folder, no
environment variables and no process of the machine's, and it runs as nobody, even where this process is root.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from kdcache.errors import KDError
from kdcache.judge.sandbox.limits import Limits

NOBODY = 65534
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}


@functools.cache
def interpreter(unsafe: bool = False) -> str:
    """Return the path of the Python that runs this, or of the system's Python if nobody cannot reach the former."""
    path = os.path.join(os.path.realpath(sys.base_prefix), "bin", f"python3.{sys.version_info.minor}")
    if unsafe or os.geteuid() != 0 or all(os.stat(folder).st_mode & 0o001 for folder in Path(path).parents):
        return path
    if os.path.exists("/usr/bin/python3"):
        return "/usr/bin/python3"
    raise KDError(f"as root the sandbox runs programs as nobody, who cannot reach {path}: apt install python3")


def bubblewrap(proc: list[str], limits: Limits) -> list[str]:
    """Return bwrap and its options. ``proc`` are those that mount /proc.

    The options that need a program's file descriptors (its files, the filter) and the ones that must come last follow
    in ``program.start``.
    """
    words = ["--unshare-all", "--unshare-user", "--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    words += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        words += ["--setenv", name, value]
    words += ["--ro-bind", "/usr", "/usr"]
    for folder in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(folder):
            words += ["--symlink", os.readlink(folder), folder]
        else:
            words += ["--ro-bind-try", folder, folder]
    for path in ("/etc/alternatives", "/etc/ld.so.cache"):  # g++ is a link into /etc/alternatives
        words += ["--ro-bind-try", path, path]
    prefix = os.path.dirname(os.path.dirname(interpreter()))
    if not f"{prefix}/".startswith("/usr/"):
        words += ["--ro-bind", prefix, prefix]
    for device in ("null", "full", "random", "urandom"):  # not zero: mapping it gives memory that no limit counts
        words += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        words += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
    words += ["--symlink", "/proc/self/fd", "/dev/fd", "--symlink", "/tmp", "/dev/shm", *proc]
    words += ["--size", str(limits.file_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    # root would not be held by the limit on processes, and would own /proc/sys, key rings and the mode of /dev/null.
    nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return [*(nobody if os.geteuid() == 0 else []), "bwrap", *words]
