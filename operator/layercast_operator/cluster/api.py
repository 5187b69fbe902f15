"""The few calls to a Kubernetes API server that the operator makes, as one small asyncio client.

Every call has a deadline and ends in an answer or in a KubernetesError that says whether trying again can help.
Who we are is read as kopf reads it: the service account in a pod, else the kubeconfig (tokens and certificates; no
login programs). A service account's token is read again every minute, because it is replaced while we run.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import kopf

from layercast_operator.errors import KubernetesError, SettingsError

CALL_DEADLINE_S = 5.0
LIST_DEADLINE_S = 30.0
TOKEN_AGE_MAX_S = 60.0
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """Where the API server is and who we are to it."""

    info: kopf.ConnectionInfo
    in_pod: bool

    @property
    def namespace(self) -> str:
        """Our own namespace."""
        return self.info.default_namespace or "default"


def log_in() -> Login:
    """The way to the API server. Raises SettingsError when there is none."""
    settings = kopf.OperatorSettings()
    info = kopf.login_with_service_account(settings=settings)
    if info is not None:
        host, port = (
            os.environ.get("KUBERNETES_SERVICE_HOST"),
            os.environ.get("KUBERNETES_SERVICE_PORT", "443"),
        )
        if host:
            # The address works before cluster DNS does, and when DNS does not.
            host = f"[{host}]" if ":" in host else host
            info = replace(info, server=f"https://{host}:{port}")
        return Login(info=info, in_pod=True)
    try:
        info = kopf.login_with_kubeconfig(settings=settings)
    except (OSError, KeyError, ValueError, kopf.LoginError) as error:
        raise SettingsError(f"the kubeconfig cannot be used: {error!r}") from error
    if info is None:
        raise SettingsError(
            "no cluster: not in a pod with a service account, and KUBECONFIG is not set; "
            "--local-dir runs without Kubernetes"
        )
    return Login(info=info, in_pod=False)


class KubeApi:
    """Calls to one API server; one pool of connections, made at the first call."""

    def __init__(self, login: Login) -> None:
        self._login = login
        self._session: aiohttp.ClientSession | None = None
        self._token = login.info.token or ""
        self._token_read_at = time.monotonic()

    @property
    def login(self) -> Login:
        """Who we are."""
        return self._login

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        deadline_s: float = CALL_DEADLINE_S,
    ) -> dict[str, Any]:
        """The answer's JSON. Raises KubernetesError."""
        headers = {"Accept": "application/json", "Content-Type": content_type, **self._authorization()}
        data = None if body is None else json.dumps(body)
        timeout = aiohttp.ClientTimeout(total=deadline_s)
        try:
            session = self._open()
            async with session.request(
                method,
                f"{self._login.info.server.rstrip('/')}{path}",
                data=data,
                params=query,
                headers=headers,
                timeout=timeout,
            ) as answer:
                content = await answer.read()
                if answer.status >= 400:
                    raise _refusal(method, path, answer.status, content)
                parsed = json.loads(content)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise KubernetesError(f"{method} {path}: {error!r}", code=0) from error
        if not isinstance(parsed, dict):
            raise KubernetesError(f"{method} {path}: the answer is no object", code=0)
        return parsed

    async def list_all(self, path: str, *, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        """A whole collection, as the server's cache has it. Raises KubernetesError."""
        return await self.call(
            "GET", path, query={"resourceVersion": "0", **(query or {})}, deadline_s=LIST_DEADLINE_S
        )

    async def apply(self, path: str, body: Mapping[str, Any], *, owner: str) -> dict[str, Any]:
        """Server-side apply as `owner`, who takes the fields over. Raises KubernetesError."""
        query = {"fieldManager": owner, "force": "true"}
        return await self.call("PATCH", path, body=body, query=query, content_type=APPLY)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=_tls(self._login.info), limit=32),
                trust_env=False,
            )
        return self._session

    def _authorization(self) -> dict[str, str]:
        now = time.monotonic()
        if self._login.in_pod and now - self._token_read_at > TOKEN_AGE_MAX_S:
            self._token_read_at = now
            try:
                self._token = (_ACCOUNT / "token").read_text(encoding="utf-8").strip() or self._token
            except OSError:
                return {"Authorization": f"Bearer {self._token}"}
        if self._token:
            return {"Authorization": f"Bearer {self._token}"}
        info = self._login.info
        if info.username and info.password:
            both = base64.b64encode(f"{info.username}:{info.password}".encode()).decode()
            return {"Authorization": f"Basic {both}"}
        return {}


def _refusal(method: str, path: str, status: int, content: bytes) -> KubernetesError:
    try:
        message = str(json.loads(content).get("message", ""))
    except (ValueError, AttributeError):
        message = content[:200].decode("utf-8", "replace")
    return KubernetesError(f"{method} {path}: {message or 'no reason given'}", code=status)


def _tls(info: kopf.ConnectionInfo) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=_path(info.ca_path), cadata=_decoded(info.ca_data))
    if info.insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if info.certificate_path and info.private_key_path:
        context.load_cert_chain(_path(info.certificate_path) or "", _path(info.private_key_path))
    elif info.certificate_data and info.private_key_data:
        # The standard library reads certificates from files only; this one lives for a moment and is ours alone.
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
            file.write(f"{_decoded(info.certificate_data)}\n{_decoded(info.private_key_data)}\n")
            file.flush()
            context.load_cert_chain(file.name)
    return context


def _path(value: object) -> str | None:
    return str(value) if value else None


def _decoded(value: str | bytes | None) -> str | None:
    if not value:
        return None
    text = value.decode("ascii") if isinstance(value, bytes) else value
    return text if text.lstrip().startswith("-----") else base64.b64decode(text).decode("ascii")


async def pause(stop: asyncio.Event, seconds: float) -> bool:
    """Wait so long or until `stop`; whether it was `stop`."""
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return False
    return True
