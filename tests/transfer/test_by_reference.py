"""Parameters leave by reference: what that changes for whoever frees or rewrites memory, and when bytes are copied."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from layercast_agent.arena import Arena
from layercast_agent.device import DeviceMemory
from layercast_agent.errors import NoCapacityError
from layercast_agent.regions import HostMemory, ReadableMemory, RegionRef, RegionTable
from layercast_agent.transport import by_reference, tcp, wire
from layercast_agent.transport.tcp import EgressLimiter, TcpServer
from layercast_agent.transport.wire import Deadline, ReadRequest
from layercast_agent.worker.handoffs import StateBytes

TOKEN = b"secret"
MIB = 1024 * 1024


@contextlib.contextmanager
def serving(table: RegionTable, *, bytes_per_s: int | None = None) -> Iterator[TcpServer]:
    server = TcpServer(table, token=TOKEN, host="127.0.0.1", port=0, limiter=EgressLimiter(bytes_per_s))
    server.start()
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def asked(
    server: TcpServer, region: RegionRef, *, offset: int = 0, nbytes: int, buffer_bytes: int = 0
) -> Iterator[socket.socket]:
    """A connection that has read the header of an answer, and nothing of the bytes."""
    with tcp.new_socket(server.address) as sock:
        tcp.connect(sock, server.address, token=TOKEN, deadline=Deadline(5))
        if buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        sock.settimeout(5)
        request = ReadRequest(
            request_id=1, region_id=region.region_id, epoch=region.epoch, offset=offset, nbytes=nbytes
        )
        sock.sendall(request.pack())
        wire.receive_bytes(sock, wire.RESPONSE_BYTES)
        yield sock


def wait_until_sent(table: RegionTable, region: RegionRef) -> None:
    turn, until = threading.Event(), time.monotonic() + 5
    while table.readers(region.region_id):
        assert time.monotonic() < until
        turn.wait(0.001)


@pytest.mark.parametrize("bytes_per_s", [None, 400 * MIB])
@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, by_reference.NBYTES_MIN), (4095, 1_300_001), (8192, 3 * MIB), (1, 3 * MIB + 4096)],
)
def test_any_range_arrives_as_it_is(bytes_per_s: int | None, offset: int, nbytes: int) -> None:
    data = bytearray(random.Random(nbytes).randbytes(offset + nbytes + 7))
    table = RegionTable()
    region = table.add(HostMemory(data))
    with (
        serving(table, bytes_per_s=bytes_per_s) as server,
        asked(server, region, offset=offset, nbytes=nbytes) as sock,
    ):
        assert wire.receive_bytes(sock, nbytes) == data[offset : offset + nbytes]


def test_parameters_are_read_when_the_receiver_takes_them_and_state_when_it_is_sent() -> None:
    table = RegionTable()
    parameters, state = (
        HostMemory(bytearray(b"\x01" * 128 * 1024)),
        torch.zeros(128 * 1024, dtype=torch.uint8),
    )
    lasting, copied = table.add(parameters), table.add(StateBytes(state))
    with (
        serving(table) as server,
        asked(server, lasting, nbytes=lasting.nbytes) as first,
        asked(server, copied, nbytes=copied.nbytes) as second,
    ):
        wait_until_sent(table, lasting)
        wait_until_sent(table, copied)
        parameters.staging(0, parameters.nbytes)[:] = b"\xff" * parameters.nbytes
        state.fill_(255)
        # The proof that nothing was copied. Whoever frees parameters early is found out by the receiver's checksum.
        assert wire.receive_bytes(first, lasting.nbytes) == b"\xff" * lasting.nbytes
        assert wire.receive_bytes(second, copied.nbytes) == bytes(copied.nbytes)


def test_memory_is_not_reused_before_its_bytes_were_acknowledged() -> None:
    table = RegionTable()
    region = table.add(HostMemory(2 * MIB))
    with (
        serving(table) as server,
        asked(server, region, nbytes=2 * MIB, buffer_bytes=64 * 1024) as sock,
    ):
        wait_until_sent(table, region)
        with pytest.raises(NoCapacityError, match="still being sent"):
            table.remove(region.region_id, deadline_s=0.05)
        assert wire.receive_bytes(sock, 2 * MIB) == bytes(2 * MIB)
        table.remove(region.region_id, deadline_s=5)


def test_a_connection_that_ends_sends_nothing_more() -> None:
    table = RegionTable()
    region = table.add(HostMemory(2 * MIB))
    with serving(table) as server, asked(server, region, nbytes=2 * MIB, buffer_bytes=64 * 1024) as sock:
        wait_until_sent(table, region)
        server.close()
        table.remove(region.region_id, deadline_s=5)
        with pytest.raises(ConnectionResetError):
            wire.receive_bytes(sock, 2 * MIB)


@pytest.mark.parametrize("obstacle", ["no_calls", "small_pipes"])
def test_what_cannot_go_by_reference_is_copied(obstacle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if obstacle == "no_calls":
        monkeypatch.setattr(by_reference, "_supported", lambda: False)
    else:
        monkeypatch.setattr(by_reference, "PIPE_BYTES_MIN", 2 * by_reference.PIPE_BYTES)
    table = RegionTable()
    memory = HostMemory(bytearray(b"\x01" * 128 * 1024))
    region = table.add(memory)
    with serving(table) as server, asked(server, region, nbytes=region.nbytes) as sock:
        wait_until_sent(table, region)
        memory.staging(0, memory.nbytes)[:] = b"\xff" * memory.nbytes
        assert wire.receive_bytes(sock, region.nbytes) == b"\x01" * region.nbytes


def test_which_memory_lasts() -> None:
    arena = Arena(8 * 4096)
    try:
        first, between, last = (arena.allocate(2 * 4096, unit=4096) for _ in range(3))
        arena.free(first)
        arena.free(last)
        apart = arena.allocate(6 * 4096, unit=4096)
        assert between.lasts(0, 2 * 4096)
        assert apart.lasts(0, 2 * 4096) and apart.lasts(2 * 4096, 4096)
        assert not apart.lasts(4096, 2 * 4096)  # joined in a copy, which nobody keeps
    finally:
        arena.close()
    assert DeviceMemory(10, torch.device("cpu")).lasts(0, 10)
    state: ReadableMemory = StateBytes(torch.zeros(10))
    assert not hasattr(state, "lasts")
