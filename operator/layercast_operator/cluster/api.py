"""The few calls to a Kubernetes API server that the operator makes, over the official client.

Every call has a deadline and ends in an answer or in a KubernetesError that says whether trying again can help.
Objects stay plain values: the mirror and the status are compared and written as the server has them, so the client's
model classes are not used, only its way to the server (configuration, TLS, tokens that are replaced while we run).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import kopf
from kubernetes.aio import client, config

from layercast_operator.errors import KubernetesError, SettingsError

CALL_DEADLINE_S = 5.0
LIST_DEADLINE_S = 30.0

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
        self._client: client.ApiClient | None = None
        self._closed = False
        self._opening = asyncio.Lock()

    @property
    def login(self) -> Login:
        """Who we are."""
        return self._login

    async def close(self) -> None:
        """Close the connections; calls that are still to come fail."""
        async with self._opening:
            self._closed = True
            opened, self._client = self._client, None
        if opened is not None:
            await opened.close()

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
        try:
            async with asyncio.timeout(deadline_s):
                api = await self._open()
                request = await api.param_serialize(
                    method,
                    path,
                    query_params=list((query or {}).items()),
                    header_params={"Accept": "application/json", "Content-Type": content_type},
                    body=body,
                    auth_settings=["BearerToken"],
                )
                answer = await api.call_api(*request, _request_timeout=deadline_s)
                content = await answer.read()
            if answer.status >= 400:
                raise _refusal(method, path, answer.status, content)
            parsed = json.loads(content)
        except (aiohttp.ClientError, client.ApiException, TimeoutError, OSError, ValueError) as error:
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

    async def _open(self) -> client.ApiClient:
        """The client; it reads a service account's token again while it runs."""
        async with self._opening:
            if self._closed:
                raise OSError("the client is closed")
            if self._client is None:
                configuration = client.Configuration()
                # Inside the cluster, whatever proxies the environment names.
                configuration.client_session_kwargs = {"trust_env": False}
                try:
                    if self._login.in_pod:
                        config.load_incluster_config(client_configuration=configuration)
                    else:
                        await config.load_kube_config(client_configuration=configuration)
                except config.ConfigException as error:
                    raise OSError(f"no way to log in: {error}") from error
                self._client = client.ApiClient(configuration)
            return self._client


def _refusal(method: str, path: str, status: int, content: bytes) -> KubernetesError:
    try:
        message = str(json.loads(content).get("message", ""))
    except (ValueError, AttributeError):
        message = content[:200].decode("utf-8", "replace")
    return KubernetesError(f"{method} {path}: {message or 'no reason given'}", code=status)


async def pause(stop: asyncio.Event, seconds: float) -> bool:
    """Wait so long or until `stop`; whether it was `stop`."""
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return False
    return True
