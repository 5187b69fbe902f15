"""The last test of the folder: what an uninstalled release leaves behind."""

from __future__ import annotations

import pytest
from tests.cluster.bed import NAMESPACE, Bed

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

KINDS = (
    "deployments,daemonsets,services,configmaps,secrets,serviceaccounts,roles,rolebindings,poddisruptionbudgets,"
    "networkpolicies,leases,clusterroles,clusterrolebindings"
)


def test_uninstall_leaves_nothing_but_the_definition(bed: Bed) -> None:
    bed.uninstall()
    bed.wait(lambda: not bed.pods(), "all pods are gone", deadline_s=150)
    left = [
        item["metadata"]["name"]
        for item in bed.get(KINDS)["items"]
        if item["metadata"].get("labels", {}).get("app.kubernetes.io/instance") == "lc"
        or NAMESPACE in item["metadata"]["name"]
    ]
    assert left == []
    assert bed.get("crd", "modelservices.layercast.dev")["spec"]["group"] == "layercast.dev"
