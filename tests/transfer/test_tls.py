"""Mutual TLS of the agent's side: who is let in, by which role, and what happens when certificates are renewed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from layercast.agent.v1alpha1 import agent_pb2, agent_pb2_grpc
from layercast.peer.v1alpha1 import peer_pb2, peer_pb2_grpc

from layercast_agent import tls as tls_module
from layercast_agent.errors import PeerError, PeerRefusedError
from layercast_agent.holdings import Holdings
from layercast_agent.regions import HostMemory, RegionTable
from layercast_agent.server import PeerServicer
from layercast_agent.tls import AGENT, OPERATOR, Tls, TlsError, aio_channel
from layercast_agent.transport import tcp, wire
from layercast_agent.transport.tcp import EgressLimiter, TcpServer, read_region
from layercast_agent.transport.wire import Deadline, ReadRequest
from layercast_cli.certificates import Authority

TOKEN = b"secret"


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def tls(authority: Authority, tmp_path: Path) -> Any:
    """Certificates by role, made at the first use."""

    def of(role: str, *, by: Authority = authority) -> Tls:
        folder = tmp_path / f"{role}-{id(by)}"
        by.issue(role, folder)
        return Tls(folder)

    return of


@contextlib.contextmanager
def serving(table: RegionTable, tls: Tls | None) -> Iterator[TcpServer]:
    server = TcpServer(table, token=TOKEN, host="127.0.0.1", port=0, limiter=EgressLimiter(None), tls=tls)
    server.start()
    try:
        yield server
    finally:
        server.close()


@pytest.mark.parametrize("nbytes", [0, 1, 16_385, 3_000_001])
def test_a_region_arrives_as_it_is(tls: Any, nbytes: int) -> None:
    data = bytearray(i * 7 % 251 for i in range(nbytes))
    table = RegionTable()
    region = table.add(HostMemory(data))
    with serving(table, tls("agent")) as server:
        read = read_region(server.address, token=TOKEN, region=region, deadline_s=20, tls=tls("agent"))
    assert read == data


def test_what_crosses_the_wire_is_not_the_data(tls: Any) -> None:
    """A relay between both ends sees every byte and finds none of the region's."""
    secret = b"SECRET-WEIGHTS" * 1000
    table = RegionTable()
    region = table.add(HostMemory(bytearray(secret)))
    seen: list[bytes] = []

    with serving(table, tls("agent")) as server, relay(server.address, seen) as address:
        assert read_region(address, token=TOKEN, region=region, deadline_s=20, tls=tls("agent")) == secret
    assert sum(map(len, seen)) > len(secret)
    assert b"SECRET" not in b"".join(seen)


@contextlib.contextmanager
def relay(address: str, seen: list[bytes]) -> Iterator[str]:
    """Passes one connection on, and remembers what it carried."""

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(65536):
                seen.append(part)
                target.sendall(part)

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            with listener.accept()[0] as near, socket.create_connection(wire.address_of(address)) as far:
                back = threading.Thread(target=pump, args=(far, near))
                back.start()
                pump(near, far)
                far.shutdown(socket.SHUT_RDWR)
                back.join(5)

        thread = threading.Thread(target=run)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)


def refusal(server: TcpServer, region: Any, client: Tls | None) -> PeerError:
    with pytest.raises(PeerError) as caught:
        read_region(server.address, token=TOKEN, region=region, deadline_s=5, tls=client)
    return caught.value


def test_the_data_plane_refuses_everybody_but_agents(tls: Any) -> None:
    table = RegionTable()
    region = table.add(HostMemory(100))
    with serving(table, tls("agent")) as server:
        refusal(server, region, None)  # plain text, and the right token
        refusal(server, region, tls("gateway"))
        refusal(server, region, tls("agent", by=Authority()))
        assert read_region(
            server.address, token=TOKEN, region=region, deadline_s=5, tls=tls("agent")
        ) == bytes(100)
        with pytest.raises(PeerRefusedError, match="token"):
            read_region(server.address, token=b"guess", region=region, deadline_s=5, tls=tls("agent"))


def test_a_client_refuses_a_server_of_another_role(tls: Any) -> None:
    table = RegionTable()
    region = table.add(HostMemory(100))
    for impostor in (None, tls("gateway"), tls("agent", by=Authority())):
        with serving(table, impostor) as server:
            refusal(server, region, tls("agent"))


def test_a_renewed_certificate_is_used_while_connections_stay(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "agent"
    authority.issue("agent", folder)
    tls = Tls(folder)
    table = RegionTable()
    region = table.add(HostMemory(bytearray(b"x" * 100_000)))
    request = ReadRequest(
        request_id=1, region_id=region.region_id, epoch=region.epoch, offset=0, nbytes=100_000
    ).pack()

    def read_on(stream: Any) -> bytearray:
        stream.sendall(request)
        header = wire.receive_bytes(stream, wire.RESPONSE_BYTES)
        assert header[0] == wire.Status.OK
        return wire.receive_bytes(stream, 100_000)

    with serving(table, tls) as server:
        with tcp.new_socket(server.address) as sock:
            before = tcp.connect(sock, server.address, token=TOKEN, deadline=Deadline(5), tls=tls)
        with contextlib.closing(before):
            assert read_on(before) == b"x" * 100_000
            other = Authority()
            other.issue(
                "agent", folder
            )  # another authority altogether: old certificates are worth nothing now
            assert read_on(before) == b"x" * 100_000
            old = tmp_path / "old"
            authority.issue("agent", old)
            refusal(server, region, Tls(old))
            assert read_region(server.address, token=TOKEN, region=region, deadline_s=5, tls=tls)


def test_half_written_files_change_nothing(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "agent"
    authority.issue("agent", folder)
    tls = Tls(folder)
    before = tls.client_context()
    (folder / "tls.crt").write_text("-----BEGIN CERT")
    assert tls.client_context() is before
    authority.issue("agent", folder)
    assert tls.client_context() is not before
    (folder / "tls.key").unlink()
    tls.client_context()
    with pytest.raises(TlsError, match=r"tls\.key"):
        Tls(folder)


class AnyStatus(agent_pb2_grpc.AgentServiceServicer):
    """Answers whoever gets through."""

    async def GetStatus(self, request: Any, context: Any) -> Any:
        return agent_pb2.GetStatusResponse(node="here")


@contextlib.asynccontextmanager
async def grpc_server(tls: Tls | None) -> AsyncIterator[str]:
    server = grpc.aio.server(interceptors=tls_module.interceptors(tls))
    agent_pb2_grpc.add_AgentServiceServicer_to_server(cast(Any, AnyStatus)(), server)
    peer_pb2_grpc.add_PeerServiceServicer_to_server(PeerServicer(Holdings()), server)
    port = tls_module.bind(server, "127.0.0.1:0", tls)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def status_code(address: str, tls: Tls | None, *, role: str = AGENT) -> grpc.StatusCode:
    async with aio_channel(address, tls, role=role) as channel:
        try:
            await agent_pb2_grpc.AgentServiceStub(channel).GetStatus(agent_pb2.GetStatusRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def watch_code(address: str, tls: Tls | None) -> grpc.StatusCode:
    async with aio_channel(address, tls) as channel:
        try:
            request = peer_pb2.WatchResidencyRequest(digest="none")
            async for _ in peer_pb2_grpc.PeerServiceStub(channel).WatchResidency(request, timeout=10):
                pass
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def test_each_service_is_for_its_callers(tls: Any) -> None:
    code = grpc.StatusCode
    async with grpc_server(tls("agent")) as address:
        assert await status_code(address, tls("operator")) is code.OK
        assert await status_code(address, tls("gateway")) is code.PERMISSION_DENIED
        assert await status_code(address, tls("agent")) is code.PERMISSION_DENIED
        assert await watch_code(address, tls("agent")) is code.NOT_FOUND
        assert await watch_code(address, tls("operator")) is code.PERMISSION_DENIED
        assert await status_code(address, None) is code.UNAVAILABLE
        assert await status_code(address, tls("operator", by=Authority())) is code.UNAVAILABLE
        # The agent is not who this caller wants to talk to.
        assert await status_code(address, tls("operator"), role=OPERATOR) is code.UNAVAILABLE


async def test_a_grpc_server_follows_its_folder(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "agent"
    authority.issue("agent", folder)
    async with grpc_server(Tls(folder)) as address:
        other = Authority()
        other.issue("agent", folder)
        caller = tmp_path / "operator"
        other.issue("operator", caller)
        assert await status_code(address, await asyncio.to_thread(Tls, caller)) is grpc.StatusCode.OK
