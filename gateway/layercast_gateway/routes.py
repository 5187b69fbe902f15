"""The routing table as plain values: which replicas serve which model, as the operator last said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from layercast.route.v1alpha1 import route_pb2


class EndpointState(Enum):
    """What a gateway may do with a replica; the meanings are route.proto's."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    LIVE = "live"


class EndpointRole(Enum):
    """For which part of a request a replica is there; the meanings are route.proto's."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


_ROLES = {
    route_pb2.ENDPOINT_ROLE_PREFILL: EndpointRole.PREFILL,
    route_pb2.ENDPOINT_ROLE_DECODE: EndpointRole.DECODE,
}

_STATES = {
    route_pb2.ENDPOINT_STATE_LOADING: EndpointState.LOADING,
    route_pb2.ENDPOINT_STATE_SERVING: EndpointState.SERVING,
    route_pb2.ENDPOINT_STATE_DRAINING: EndpointState.DRAINING,
    route_pb2.ENDPOINT_STATE_LIVE: EndpointState.LIVE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One replica."""

    replica_id: str
    address: str
    """host:port of its EngineService."""
    state: EndpointState
    role: EndpointRole = EndpointRole.BOTH


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRoute:
    """Where one model is served."""

    model: str
    digest: str
    """Empty until the checkpoint is resolved."""
    context_length_max: int
    """Tokens, prompt and output together; 0 when not known yet."""
    endpoints: tuple[Endpoint, ...]
    message: str
    """Why no replica serves, in words."""
    created_unix_s: int


RouteTable = Mapping[str, ModelRoute]
"""Routes by model name."""


def table_of(response: route_pb2.WatchRoutesResponse) -> dict[str, ModelRoute]:
    """The table of a message; endpoints without address or in an unknown state are left out."""
    return {
        route.model: ModelRoute(
            model=route.model,
            digest=route.digest,
            context_length_max=route.context_length_max,
            endpoints=tuple(
                Endpoint(
                    replica_id=e.replica_id,
                    address=e.address,
                    state=_STATES[e.state],
                    role=_ROLES.get(
                        e.role, EndpointRole.BOTH
                    ),  # one of a newer operator can do everything too
                )
                for e in route.endpoints
                if e.state in _STATES and e.address
            ),
            message=route.message,
            created_unix_s=route.created_unix_s,
        )
        for route in response.models
    }
