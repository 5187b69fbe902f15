"""Who may talk to this process, and how it proves who it is: certificates of one folder, read again when they change.

The folder has the layout of a Kubernetes TLS secret (`ca.crt`, `tls.crt`, `tls.key`), as cert-manager renews it in
place. A certificate names a role, not a machine: whoever calls demands the role of whom it calls, and the
operator serves routes to gateways only. Without a folder
nothing is encrypted.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from asn1crypto import pem, x509

from layercast_operator.errors import SettingsError

AGENT = "agent.layercast.internal"
GATEWAY = "gateway.layercast.internal"

FILES = ("ca.crt", "tls.crt", "tls.key")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    stamp: tuple[tuple[int, int, int], ...]
    authority: bytes
    certificate: bytes
    key: bytes
    expires_at: float


def _expires_at(certificate: bytes) -> float:
    """When the first certificate of a PEM file ends, unix seconds. ValueError when there is none."""
    _, _, der = pem.unarmor(certificate)
    return float(x509.Certificate.load(der)["tbs_certificate"]["validity"]["not_after"].native.timestamp())


class Tls:
    """The certificates of one folder. Thread-safe: gRPC asks from threads of its own."""

    def __init__(self, folder: Path) -> None:
        """SettingsError: a file is missing, or they are not an authority, a certificate and its key."""
        self._folder = folder
        self._lock = threading.Lock()
        try:
            self._loaded = self._load()
        except OSError as error:  # ssl.SSLError is one
            raise SettingsError(f"--tls-dir {folder}: {', '.join(FILES)} are not usable: {error}.") from error

    @property
    def version(self) -> object:
        """Another one after each renewal."""
        return self._newest().stamp

    @property
    def expires_at(self) -> float:
        """When the certificate ends, in unix seconds."""
        return self._newest().expires_at

    def channel(
        self, address: str, *, role: str, options: Sequence[tuple[str, Any]] = ()
    ) -> grpc.aio.Channel:
        """A channel to a process of that role."""
        newest = self._newest()
        credentials = grpc.ssl_channel_credentials(newest.authority, newest.key, newest.certificate)
        named = [*options, ("grpc.ssl_target_name_override", role)]
        return grpc.aio.secure_channel(address, credentials, options=named)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a port; every handshake uses the newest files and wants the caller's certificate."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._configuration, require_client_authentication=True
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        newest = self._newest()
        return grpc.ssl_server_certificate_configuration(
            [(newest.key, newest.certificate)], root_certificates=newest.authority
        )

    def _newest(self) -> _Loaded:
        """The files as they are; while they are not usable, those before."""
        with self._lock:
            try:
                if self._stamp() != self._loaded.stamp:
                    self._loaded = self._load()
                    log.info("certificates were renewed", extra={"folder": str(self._folder)})
            except OSError as error:  # being written: the next look is soon
                log.warning("new certificates are not usable", extra={"reason": str(error)})
            return self._loaded

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        stats = [(self._folder / name).stat() for name in FILES]
        return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)

    def _load(self) -> _Loaded:
        stamp = self._stamp()
        authority, certificate, key = (self._folder / name for name in FILES)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # only to see that they fit together
        context.load_verify_locations(authority)
        context.load_cert_chain(certificate, key)
        return _Loaded(
            stamp=stamp,
            authority=authority.read_bytes(),
            certificate=certificate.read_bytes(),
            key=key.read_bytes(),
            expires_at=_expires_at(certificate.read_bytes()),
        )


def channel(
    address: str, tls: Tls | None, *, role: str, options: Sequence[tuple[str, Any]] = ()
) -> grpc.aio.Channel:
    """A channel to a process of that role; plaintext without `tls`."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return tls.channel(address, role=role, options=options)


class Callers(grpc.aio.ServerInterceptor):
    """Refuses callers whose certificate does not name `role`."""

    def __init__(self, role: str) -> None:
        self._role = role

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Called once a call; only the handler knows the certificate, so that is wrapped. All of ours stream."""
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.unary_stream is None:
            return handler

        async def guarded(request: Any, context: Any) -> Any:
            names = {n.decode() for n in context.auth_context().get("x509_subject_alternative_name", ())}
            if self._role not in names:
                reason = (
                    f"this service is for {self._role}, not for {', '.join(sorted(names)) or 'nobody named'}"
                )
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, reason)
            async for message in handler.unary_stream(request, context):
                yield message

        return grpc.unary_stream_rpc_method_handler(
            guarded,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
