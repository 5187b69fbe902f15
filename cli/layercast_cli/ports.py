"""Free ports for local processes."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import socket
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layercast_cli.errors import UsageError

GIVEN_BY_THE_KERNEL = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST, HIGHEST = 10_000, 29_999  # below the ports that Kubernetes gives to services of its nodes
TRIES = 1000
PROMISES_MAX = 128  # of this process; whoever the oldest were for listens there by now

_promises: deque[int] = deque()


@contextmanager
def free_ports(host: str, count: int) -> Iterator[list[int]]:
    """`count` different free ports, held until the block ends so that nobody else is given one of them.

    Afterwards, until whoever they are for listens there, any connection could take a port that the kernel gives by
    itself. So they are others as long as there are some. Nor does another process that asks here get one of them.
    """
    held: list[socket.socket] = []
    try:
        for port in _candidates():
            if len(held) == count:
                break
            found = _bound(host, port)
            if found is not None and _promised(found.getsockname()[1]):
                held.append(found)
            elif found is not None:
                found.close()
        yield [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()


def _bound(host: str, port: int) -> socket.socket | None:
    """A socket there; None when somebody else is. OSError when it is not the port's fault."""
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE and port:
            return None
        raise
    return found


def _promised(port: int) -> bool:
    """Whether it is ours to give away: a locked file tells the other processes of this user so, until we end."""
    folder = Path(tempfile.gettempdir()) / f"layercast-ports-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        promise = os.open(folder / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return True  # no place for promises: two who start at the same moment may meet, as ever
    try:
        fcntl.flock(promise, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(promise)
        return False
    except OSError:
        pass  # a file system without locks: no promise either
    _promises.append(promise)
    if len(_promises) > PROMISES_MAX:
        os.close(_promises.popleft())
    return True


def _candidates() -> Iterator[int]:
    """Ports to try: some that the kernel gives to nobody by itself, then whatever it gives (0)."""
    try:
        first = int(GIVEN_BY_THE_KERNEL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 0  # another kernel, whose habits we do not know
    known = range(LOWEST, min(first, HIGHEST + 1))
    yield from random.sample(known, min(TRIES, len(known)))
    yield from itertools.repeat(0)


def check_free(host: str, port: int) -> None:
    """Raises UsageError when nobody can listen on `port` now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port in TIME_WAIT is free, one that is listened on is not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"port {port} of {host} cannot be used ({error.strerror}); choose another with --port"
            ) from None
