"""Free ports for local processes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from layercast_cli.errors import UsageError


@contextmanager
def free_ports(host: str, count: int) -> Iterator[list[int]]:
    """`count` different free ports, held until the block ends so that nobody else is given one of them."""
    held = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for each in held:
            each.bind((host, 0))
        yield [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()


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
