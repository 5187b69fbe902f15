"""Runs a program that ends when its parent ends, however the parent ends.

`python tether.py PARENT_PID PROGRAM ARG...` asks the kernel to kill this process when the thread that
started it dies, then becomes PROGRAM: same process id, no process in between. It is run as a file, outside
of any package, because code between fork and exec in a process with threads may deadlock (`preexec_fn`),
and this costs 20 ms."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Never returns: becomes the program, or exits with 1 when the parent is gone already."""
    parent, argv = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the call above: nobody would tell us any more.
    if os.getppid() != parent:
        sys.exit(1)
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main()
