"""The API server over one open connection: a kubectl takes a tenth of a second to start, and tests look often."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import urllib3
from kubernetes import client, config


class Api:
    """Objects of one namespace, of the cluster that KUBECONFIG names."""

    def __init__(self, namespace: str) -> None:
        """Connects at the first use."""
        self._namespace = namespace
        self._opened: client.ApiClient | None = None

    def get(self, group: str, plural: str, name: str = "", **query: str) -> Any:
        """One object, or a list of them. OSError: the API server is away, or has none of that name."""
        return self._ask("GET", group, plural, name, query_params=list(query.items()))

    def patch(self, group: str, plural: str, name: str, change: Mapping[str, Any]) -> Any:
        """Merges into one object. OSError as `get`."""
        headers = {"Content-Type": "application/merge-patch+json"}
        return self._ask("PATCH", group, plural, name, header_params=headers, body=change)

    def _ask(self, method: str, group: str, plural: str, name: str, **what: Any) -> Any:
        if self._opened is None:
            self._opened = config.new_client_from_config()
        path = f"/{group}/namespaces/{self._namespace}/{plural}/{name}".rstrip("/")
        asked = self._opened.param_serialize(method, path, auth_settings=["BearerToken"], **what)
        try:
            answer = self._opened.call_api(*asked, _request_timeout=30)
            answer.read()
        except urllib3.exceptions.HTTPError as error:
            raise OSError(str(error)) from error
        if answer.status != 200:
            raise OSError(f"{path}: {answer.status} {answer.reason}")
        return json.loads(answer.data)
