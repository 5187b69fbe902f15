"""The data plane over real sockets: who may read what, in time, and with whose bytes first."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from layercast_agent.errors import (
    AgentError,
    NoCapacityError,
    PeerLostError,
    PeerRefusedError,
    RegionFencedError,
)
from layercast_agent.regions import HostMemory, RegionRef, RegionTable
from layercast_agent.transport import tcp, wire
from layercast_agent.transport.tcp import EgressLimiter, TcpServer, read_region
from layercast_agent.transport.wire import Deadline, ReadRequest, ResponseHeader, Status

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
def connected(server: TcpServer) -> Iterator[socket.socket]:
    with tcp.new_socket(server.address) as sock:
        tcp.connect(sock, server.address, token=TOKEN, deadline=Deadline(5))
        sock.settimeout(5)
        yield sock


def read(server: TcpServer, region: RegionRef, *, deadline_s: float = 10.0) -> bytearray:
    return read_region(server.address, token=TOKEN, region=region, deadline_s=deadline_s)


@pytest.mark.parametrize("nbytes", [0, 1, 255, 300_001, tcp.ONE_READ_BYTES + 7])
def test_a_region_arrives_as_it_is(nbytes: int) -> None:
    data = bytearray(random.Random(nbytes).randbytes(nbytes))
    table = RegionTable()
    region = table.add(HostMemory(data))
    with serving(table) as server:
        assert read(server, region) == data


def test_pipelined_requests_are_answered_in_order_and_within_bounds() -> None:
    table = RegionTable()
    region = table.add(HostMemory(bytearray(range(200))))
    asked = [(0, 10), (190, 10), (195, 10), (200, 0), (0, wire.READ_BYTES_MAX + 1), (7, 1)]
    with serving(table) as server, connected(server) as sock:
        for number, (offset, nbytes) in enumerate(asked):
            request = ReadRequest(
                request_id=number,
                region_id=region.region_id,
                epoch=region.epoch,
                offset=offset,
                nbytes=nbytes,
            )
            sock.sendall(request.pack())
        answers = []
        for number in range(len(asked)):
            header = ResponseHeader.unpack(wire.receive_bytes(sock, wire.RESPONSE_BYTES))
            assert header.request_id == number
            answers.append((header.status, bytes(wire.receive_bytes(sock, header.nbytes))))
    statuses = [status for status, _ in answers]
    assert statuses == [Status.OK, Status.OK, Status.FENCED, Status.OK, Status.REFUSED, Status.OK]
    assert answers[0][1] == bytes(range(10)) and answers[1][1] == bytes(range(190, 200))
    assert b"outside region" in answers[2][1]
    assert answers[5][1] == b"\x07"


def test_other_epochs_and_removed_regions_are_fenced() -> None:
    table = RegionTable()
    region = table.add(HostMemory(100))
    older = RegionRef(region_id=region.region_id, epoch=region.epoch - 1, nbytes=100)
    with serving(table) as server:
        with pytest.raises(RegionFencedError, match="not readable"):
            read(server, older)
        table.remove(region.region_id, deadline_s=1)
        with pytest.raises(RegionFencedError, match="not readable"):
            read(server, region)


def test_a_client_without_the_token_learns_nothing() -> None:
    table = RegionTable()
    region = table.add(HostMemory(100))
    with serving(table) as server:
        with pytest.raises(PeerRefusedError, match="refused the token"):
            read_region(server.address, token=b"guess", region=region, deadline_s=5)
        # Not even when it goes on as if nothing had happened.
        with tcp.new_socket(server.address) as sock:
            sock.settimeout(5)
            sock.connect(wire.address_of(server.address))
            request = ReadRequest(
                request_id=1, region_id=region.region_id, epoch=region.epoch, offset=0, nbytes=9
            )
            sock.sendall(bytes(wire.NONCE_BYTES + wire.MAC_BYTES) + request.pack())
            heard = b""
            with contextlib.suppress(ConnectionError):
                while part := sock.recv(1000):
                    heard += part
            assert len(heard) <= len(wire.MAGIC) + wire.NONCE_BYTES + 1 + wire.MAC_BYTES
        assert read(server, region) == bytes(100)


@pytest.mark.parametrize(
    ("hello", "proof", "problem"),
    [
        (wire.MAGIC + bytes(32), bytes(1 + 32), "does not know the token"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(40), b"", "another protocol"),
        (b"LC", b"", "closed the connection"),
    ],
)
def test_a_server_must_prove_itself(hello: bytes, proof: bytes, problem: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        def impostor() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):  # the client may leave at any point
                sock.settimeout(5)
                sock.sendall(hello + proof)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1000):
                    pass

        thread = threading.Thread(target=impostor)
        thread.start()
        with pytest.raises((PeerRefusedError, PeerLostError), match=problem):
            read_region(address, token=TOKEN, region=RegionRef(region_id=1, epoch=1, nbytes=9), deadline_s=5)
        thread.join(5)


def test_the_proofs_of_the_two_roles_differ() -> None:
    """Otherwise an impostor could send a client's proof back to it."""
    client_end, server_end = socket.socketpair()
    with client_end, server_end:
        mine = bytes(32)

        def reflect() -> None:
            server_end.sendall(wire.MAGIC + mine)
            answer = bytes(wire.receive_bytes(server_end, 64))
            mirrored = hmac.new(TOKEN, b"client" + mine + answer[:32], hashlib.sha256).digest()
            assert answer[32:] == mirrored
            server_end.sendall(bytes([Status.OK]) + answer[32:])

        thread = threading.Thread(target=reflect)
        thread.start()
        with pytest.raises(PeerRefusedError, match="does not know the token"):
            wire.greet_as_client(client_end, token=TOKEN, deadline=Deadline(5))
        thread.join(5)


def test_a_silent_peer_is_lost_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(PeerLostError, match=r"in time|within"):
            read_region(
                address, token=TOKEN, region=RegionRef(region_id=1, epoch=1, nbytes=9), deadline_s=0.2
            )
    with pytest.raises(PeerLostError, match="refused"):
        read_region(address, token=TOKEN, region=RegionRef(region_id=1, epoch=1, nbytes=9), deadline_s=5)
    with pytest.raises(PeerRefusedError, match="not a data address"):
        read_region("nowhere", token=TOKEN, region=RegionRef(region_id=1, epoch=1, nbytes=9), deadline_s=5)


def test_a_region_is_not_freed_while_it_is_sent() -> None:
    table = RegionTable()
    region = table.add(HostMemory(bytearray(b"x" * MIB)))
    with serving(table, bytes_per_s=4 * MIB) as server, connected(server) as sock:
        request = ReadRequest(
            request_id=1, region_id=region.region_id, epoch=region.epoch, offset=0, nbytes=MIB
        )
        sock.sendall(request.pack())
        wire.receive_bytes(sock, wire.RESPONSE_BYTES)
        with pytest.raises(NoCapacityError):
            table.remove(region.region_id, deadline_s=0.01)
        assert wire.receive_bytes(sock, MIB) == b"x" * MIB
        table.remove(region.region_id, deadline_s=5)


def test_urgent_bytes_overtake_parameters() -> None:
    table = RegionTable()
    parameters, state = table.add(HostMemory(2 * MIB)), table.add(HostMemory(MIB))
    order: list[str] = []
    with serving(table, bytes_per_s=4 * MIB) as server, connected(server) as sock:
        request = ReadRequest(
            request_id=1, region_id=parameters.region_id, epoch=parameters.epoch, offset=0, nbytes=2 * MIB
        )
        sock.sendall(request.pack())
        wire.receive_bytes(sock, wire.RESPONSE_BYTES)

        def slow() -> None:
            wire.receive_bytes(sock, 2 * MIB)
            order.append("parameters")

        thread = threading.Thread(target=slow)
        thread.start()
        read(server, state)
        order.append("state")
        thread.join(10)
    assert order == ["state", "parameters"]


def test_a_closed_server_loses_its_clients() -> None:
    table = RegionTable()
    region = table.add(HostMemory(64 * MIB))
    lost: list[Exception] = []
    with serving(table, bytes_per_s=MIB) as server:

        def client() -> None:
            try:
                read(server, region, deadline_s=30)
            except PeerLostError as error:
                lost.append(error)

        thread = threading.Thread(target=client)
        with connected(server):
            thread.start()
        server.close()
        thread.join(10)
    assert lost and not thread.is_alive()


def test_a_port_in_use_is_said_clearly() -> None:
    with serving(RegionTable()) as server:
        port = int(server.address.rpartition(":")[2])
        second = TcpServer(
            RegionTable(), token=TOKEN, host="127.0.0.1", port=port, limiter=EgressLimiter(None)
        )
        with pytest.raises(AgentError, match=f"cannot listen on data address 127.0.0.1:{port}"):
            second.start()


@pytest.mark.parametrize(("token", "host"), [(b"", "127.0.0.1"), (b"x", "")])
def test_no_server_without_a_token_or_for_everybody(token: bytes, host: str) -> None:
    with pytest.raises(ValueError, match="needs a token and a host"):
        TcpServer(RegionTable(), token=token, host=host, port=0, limiter=EgressLimiter(None))


@pytest.mark.parametrize("frame", [b"\xff" * wire.REQUEST_BYTES, b"\x01\x02" + bytes(wire.REQUEST_BYTES - 2)])
def test_frames_that_are_no_requests_are_refused(frame: bytes) -> None:
    with pytest.raises(PeerRefusedError):
        ReadRequest.unpack(frame)


@pytest.mark.parametrize(
    "frame",
    [b"\xff" * wire.RESPONSE_BYTES, (b"\x02" + b"\x00" * 7 + b"\x01" * 8).ljust(wire.RESPONSE_BYTES, b"\0")],
)
def test_frames_that_are_no_responses_are_refused(frame: bytes) -> None:
    with pytest.raises(PeerRefusedError):
        ResponseHeader.unpack(frame)


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_the_limiter_keeps_its_rate_and_urgent_bytes_go_into_debt() -> None:
    time = FakeTime()
    limiter = EgressLimiter(1000, clock=time.clock, sleep=time.sleep)
    for _ in range(11):
        limiter.take(100)
    assert time.now - 100 == pytest.approx(
        0.99
    )  # eleven of 0.1 s, the burst allowance off; the last one is out
    before = time.now
    limiter.take(500, urgent=True)
    assert time.now == before
    limiter.take(1)
    assert time.now - before == pytest.approx(0.6)  # what was sent before, and the urgent bytes


def test_no_limit_never_waits() -> None:
    time = FakeTime()
    for nothing in (None, 0):
        limiter = EgressLimiter(nothing, clock=time.clock, sleep=time.sleep)
        limiter.take(10**12)
    assert time.now == 100
