"""Who may talk to this process, and how it proves who it is: certificates of one folder, re-read when they change.

The folder has the layout of a Kubernetes TLS secret (`ca.crt`, `tls.crt`, `tls.key`), as cert-manager renews it in
place. A certificate names a role (`agent.layercast.internal`, ...), not a machine: whoever calls demands the role of
whom it calls, and every service demands the role of its callers. Without a folder nothing is encrypted.

New connections use the newest files; a folder that is half written keeps the ones before. gRPC channels keep the
certificate that they were opened with: they live as long as one transfer or one cooperation.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from asn1crypto import pem, x509
from grpc import aio

from layercast_agent.errors import AgentError

AGENT = "agent.layercast.internal"
GATEWAY = "gateway.layercast.internal"
OPERATOR = "operator.layercast.internal"

CALLERS: Mapping[str, str] = {
    "layercast.agent.v1alpha1.AgentService": OPERATOR,
    "layercast.engine.v1alpha1.EngineService": GATEWAY,
    "layercast.peer.v1alpha1.PeerService": AGENT,
}
"""Who may call which service."""

FILES = ("ca.crt", "tls.crt", "tls.key")

log = logging.getLogger(__name__)


class TlsError(AgentError):
    """The folder is not usable; the text says which file and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    stamp: tuple[tuple[int, int, int], ...]
    authority: bytes
    certificate: bytes
    key: bytes
    server: ssl.SSLContext
    client: ssl.SSLContext
    expires_at: float


def _expires_at(certificate: bytes) -> float:
    """When the first certificate of a PEM file ends, unix seconds. ValueError when there is none."""
    _, _, der = pem.unarmor(certificate)
    return float(x509.Certificate.load(der)["tbs_certificate"]["validity"]["not_after"].native.timestamp())


class Tls:
    """The certificates of one folder. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        """TlsError: a file is missing, or they are not an authority, a certificate and its key."""
        self._folder = folder
        self._lock = threading.Lock()
        self._loaded = self._load()

    @property
    def expires_at(self) -> float:
        """When the certificate ends, in unix seconds."""
        return self._newest().expires_at

    def server_context(self) -> ssl.SSLContext:
        """For a socket that accepts: the client must show a certificate of the same authority."""
        return self._newest().server

    def client_context(self) -> ssl.SSLContext:
        """For a socket that connects; its `server_hostname` is the role that the server must have."""
        return self._newest().client

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC port; every handshake uses the newest files."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._configuration, require_client_authentication=True
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a gRPC channel."""
        newest = self._newest()
        return grpc.ssl_channel_credentials(newest.authority, newest.key, newest.certificate)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        newest = self._newest()
        pair = (newest.key, newest.certificate)
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=newest.authority)

    def _newest(self) -> _Loaded:
        with self._lock:
            try:
                if self._stamp() != self._loaded.stamp:
                    self._loaded = self._load()
                    log.info("certificates were renewed", extra={"folder": str(self._folder)})
            except (TlsError, OSError) as error:  # being written: the next connection looks again
                log.warning("new certificates are not usable", extra={"reason": str(error)})
            return self._loaded

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        stats = [(self._folder / name).stat() for name in FILES]
        return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)

    def _load(self) -> _Loaded:
        authority, certificate, key = (self._folder / name for name in FILES)
        try:
            stamp = self._stamp()
            server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            for context in (server, client):
                context.minimum_version = ssl.TLSVersion.TLSv1_3
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(authority)
                context.load_cert_chain(certificate, key)
            return _Loaded(
                stamp=stamp,
                authority=authority.read_bytes(),
                certificate=certificate.read_bytes(),
                key=key.read_bytes(),
                server=server,
                client=client,
                expires_at=_expires_at(certificate.read_bytes()),
            )
        except (OSError, ssl.SSLError) as error:
            raise TlsError(f"{self._folder}: {', '.join(FILES)} are not usable: {error}") from error


def names_of(certificate: Mapping[str, Any] | None) -> frozenset[str]:
    """The DNS names of a peer's certificate, as `SSLSocket.getpeercert` tells them."""
    return frozenset(name for kind, name in (certificate or {}).get("subjectAltName", ()) if kind == "DNS")


Options = Sequence[tuple[str, Any]]


def _named(options: Options, role: str) -> list[tuple[str, Any]]:
    return [*options, ("grpc.ssl_target_name_override", role)]


def aio_channel(address: str, tls: Tls | None, *, role: str = AGENT, options: Options = ()) -> aio.Channel:
    """A channel to a process of that role; plaintext without `tls`."""
    if tls is None:
        return aio.insecure_channel(address, options=options)
    return aio.secure_channel(address, tls.channel_credentials(), options=_named(options, role))


def sync_channel(address: str, tls: Tls | None, *, role: str = AGENT, options: Options = ()) -> grpc.Channel:
    """As `aio_channel`, for threads."""
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, tls.channel_credentials(), options=_named(options, role))


def bind(server: aio.Server, address: str, tls: Tls | None) -> int:
    """Adds the port; returns its number. RuntimeError: cannot be bound."""
    if tls is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, tls.server_credentials())


def interceptors(tls: Tls | None) -> list[aio.ServerInterceptor]:
    """What a server needs to hold `CALLERS`."""
    return [] if tls is None else [_Callers()]


class _Callers(aio.ServerInterceptor):
    """Refuses callers whose certificate does not name the role that the service is for."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """Called once a call; the certificate is known only to the handler, so that is wrapped."""
        handler = await continuation(details)
        role = CALLERS.get(details.method.split("/")[1])
        return handler if handler is None or role is None else _guarded(handler, role)


def _guarded(handler: Any, role: str) -> Any:
    async def check(context: Any) -> None:
        names = {name.decode() for name in context.auth_context().get("x509_subject_alternative_name", ())}
        if role not in names:
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED, f"this service is for {role}, not for {sorted(names)}"
            )

    async def one(request: Any, context: Any) -> Any:
        await check(context)
        return await (handler.unary_unary or handler.stream_unary)(request, context)

    async def many(request: Any, context: Any) -> Any:
        await check(context)
        async for message in (handler.unary_stream or handler.stream_stream)(request, context):
            yield message

    wrap: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return wrap(
        many if handler.response_streaming else one,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
