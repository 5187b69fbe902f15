"""How an agent ends: what it has moves away first.

It says that it leaves; the operator then starts replicas elsewhere, and drains and stops those here. Meanwhile the
agent serves as before. When its time is up - the operator is away, or no other node has room - it drains by itself
what is left: requests go back to their gateways with their tokens, and nobody waits for a broken stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from layercast.agent.v1alpha1 import agent_pb2 as pb

from layercast_agent.agent import Agent
from layercast_agent.workers import CommandError

log = logging.getLogger(__name__)

LOOK_S = 0.1
GIVE_BACK_S = 3.0
"""How long workers may take to give all requests back; it takes them one step of the engine."""

_OWN_REQUESTS = frozenset(
    {
        pb.REPLICA_STATE_LIVE,
        pb.REPLICA_STATE_LEADING,
        pb.REPLICA_STATE_SERVING,
        pb.REPLICA_STATE_DRAINING,
    }
)


def needed(status: pb.GetStatusResponse) -> list[str]:
    """What here may still be somebody's only one: replicas with requests or a complete copy, and host copies."""
    holding = {*_OWN_REQUESTS, pb.REPLICA_STATE_DRAINED}
    replicas = [replica.replica_id for replica in status.replicas if replica.state in holding]
    copies = [c.digest for c in status.host_pool.copies if c.state == pb.HOST_COPY_STATE_COMPLETE]
    return replicas + copies


def executing(status: pb.GetStatusResponse) -> list[str]:
    """Replicas that may own requests."""
    return [replica.replica_id for replica in status.replicas if replica.state in _OWN_REQUESTS]


async def leave(agent: Agent, *, grace_s: float, hurry: asyncio.Event) -> None:
    """Returns when nothing here is needed any more, after `grace_s`, or soon after `hurry` is set."""
    if grace_s <= 0:
        return
    agent.leaving = True
    log.info("the agent is to end; its replicas move away", extra={"needed": needed(agent.status())})
    await _until(lambda: not needed(agent.status()), within_s=grace_s, hurry=hurry)
    if not (left := executing(agent.status())):
        return
    log.warning("replicas are left when the agent ends; they are drained", extra={"replicas": left})
    await asyncio.gather(*(_give_back(agent, replica_id) for replica_id in left))
    await _until(lambda: not executing(agent.status()), within_s=GIVE_BACK_S, hurry=asyncio.Event())


async def _until(holds: Callable[[], bool], *, within_s: float, hurry: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            while not holds() and not hurry.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await hurry.wait()


async def _give_back(agent: Agent, replica_id: str) -> None:
    try:
        await agent.drain_replica(pb.DrainReplicaRequest(replica_id=replica_id))
    except CommandError as error:
        log.warning("a replica was not drained", extra={"replica": replica_id, "reason": str(error)})
