"""What of a status reaches the API server: nothing that it would refuse or that says nothing."""

from __future__ import annotations

from typing import Any

from layercast_operator.cluster.status_writer import published


def test_what_says_nothing_is_left_out() -> None:
    """An applied empty list became null in Kubernetes 1.20, and every status of a service at zero was refused."""
    status: dict[str, Any] = {
        "name": "x",
        "replicas": [],
        "endpoint": "",
        "lastScale": None,
        "ready": "0/0",
        "counts": {"active": 0},
    }
    assert published(status) == {"ready": "0/0", "counts": {"active": 0}}
