"""Mutual TLS between operator, gateway and agents: roles, strangers, renewed certificates."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from layercast.route.v1alpha1 import route_pb2, route_pb2_grpc

from layercast_gateway.route_watch import RouteWatch
from layercast_gateway.tls import Tls as GatewayTls
from layercast_operator.agents import AgentCalls
from layercast_operator.errors import AgentCallError, SettingsError
from layercast_operator.routes import RouteTable, serve_routes
from layercast_operator.tls import Tls, channel

OPERATOR = "operator.layercast.internal"


class Authority:
    """Makes certificates for roles, as cert-manager would put them into a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        self._openssl(
            "req", "-x509", "-nodes", *_KEY, "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.crt"
        )

    def folder(self, role: str, name: str = "") -> Path:
        made = self.root / (name or role)
        made.mkdir(exist_ok=True)
        self._openssl(
            "req", "-nodes", *_KEY, "-subj", f"/CN={role}", "-keyout", f"{made}/tls.key", "-out", "csr"
        )
        (self.root / "san").write_text(f"subjectAltName=DNS:{role}.layercast.internal")
        sign = (
            "x509",
            "-req",
            "-in",
            "csr",
            "-CA",
            "ca.crt",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "1",
        )
        self._openssl(*sign, "-extfile", "san", "-out", f"{made}/tls.crt")
        (made / "ca.crt").write_bytes((self.root / "ca.crt").read_bytes())
        return made

    def _openssl(self, *words: str) -> None:
        subprocess.run(["openssl", *words], cwd=self.root, check=True, capture_output=True, timeout=20)


_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@contextlib.asynccontextmanager
async def operator(tls: Tls) -> AsyncIterator[str]:
    table = RouteTable()
    await table.publish([route_pb2.ModelRoute(model="m")])
    server, port = await serve_routes(table, host="127.0.0.1", port=0, tls=tls)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await table.close()
        await server.stop(0.2)


async def first_table(address: str, tls: Tls | None) -> Any:
    async with channel(address, tls, role=OPERATOR) as opened:
        stub = route_pb2_grpc.RouteServiceStub(opened)
        async for table in stub.WatchRoutes(route_pb2.WatchRoutesRequest(gateway_id="g"), timeout=5):
            return table
    raise AssertionError("no table")


async def test_a_gateway_is_told_routes_and_nobody_else_is(authority: Authority, tmp_path: Path) -> None:
    async with operator(Tls(authority.folder("operator"))) as address:
        tables: asyncio.Queue[Any] = asyncio.Queue()
        watch = RouteWatch(
            operator=address,
            gateway_id="g",
            on_table=tables.put_nowait,
            tls=GatewayTls(authority.folder("gateway")),
        )
        task = asyncio.create_task(watch.run())
        async with asyncio.timeout(10):
            assert set(await tables.get()) == {"m"}
        task.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await first_table(address, Tls(authority.folder("agent")))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "gateway.layercast.internal" in str(caught.value.details())
        strangers = Authority(tmp_path / "others")
        for stranger in (Tls(strangers.folder("gateway")), None):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await first_table(address, stranger)
            assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


async def test_renewed_certificates_are_used_without_a_restart(authority: Authority) -> None:
    folder = authority.folder("operator", "renewed")
    tls = Tls(folder)
    gateway = Tls(authority.folder("gateway"))
    async with operator(tls) as address:
        assert await first_table(address, gateway)
        before = tls.version
        authority.folder("operator", "renewed")
        assert tls.version != before
        assert await first_table(address, gateway)
        (folder / "tls.key").write_text("half written")
        assert await first_table(address, gateway), "what was usable last stays in force"


async def test_the_operator_asks_nobody_who_is_no_agent(authority: Authority) -> None:
    async with operator(Tls(authority.folder("operator"))) as address:
        calls = AgentCalls(Tls(authority.folder("operator")))
        await calls.set_addresses({"n": address})
        with pytest.raises(AgentCallError, match="UNAVAILABLE"):
            await calls.get_status("n", polled_at=0.0, deadline_s=5.0)
        await calls.close()


def test_a_folder_that_is_not_usable_is_said_at_the_start(tmp_path: Path) -> None:
    for kind in (Tls, GatewayTls):
        with pytest.raises(Exception, match="--tls-dir") as caught:
            kind(tmp_path)
        assert type(caught.value).__name__ == SettingsError.__name__
