"""The first test of the folder: from the chart of the commit before to this one, while requests run."""

from __future__ import annotations

import pytest
from tests.cluster.bed import Bed, Traffic

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


def test_helm_upgrade_loses_nothing(served: Bed, right: dict[str, str], upgrade: Traffic) -> None:
    """Every pod is replaced: gateways that serve, the operator that leads, agents that hold replicas."""
    assert len(upgrade.answers) >= 4
    assert not upgrade.wrong(right)
