"""The text side of every checkpoint in the routing table: fetched from any worker that has it, kept in memory.

A checkpoint's digest never changes its meaning, so what was read once stays valid for as long as it is remembered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict

from layercast_gateway.backoff import Backoff
from layercast_gateway.dispatcher import Dispatcher
from layercast_gateway.errors import QueueDeadlineError, ServiceError, ShuttingDownError
from layercast_gateway.tokenizer import ModelText

log = logging.getLogger(__name__)

TEXTS_MAX = 64
"""Checkpoints that are remembered; a vocabulary takes some tens of megabytes."""


class Texts:
    """`ModelText` by digest. One fetch a digest runs at a time, for as long as a route names the digest."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._texts: OrderedDict[str, ModelText | ServiceError] = OrderedDict()
        self._fetches: dict[str, asyncio.Task[None]] = {}
        self._changed = dispatcher.changed

    async def get(self, model: str, *, accepted_at: float, deadline: float) -> ModelText:
        """The text side of a model's checkpoint, waiting for a worker to hand it out.

        Times are monotonic seconds. UnknownModelError, NoReplicaError when nobody will bring it, QueueDeadlineError,
        ShuttingDownError, or ServiceError when the checkpoint's files cannot be used.
        """
        while not self._dispatcher.closing:
            digest = self._dispatcher.route(model).digest
            found = self._texts.get(digest)
            if isinstance(found, ServiceError):
                raise found
            if found is not None:
                self._texts.move_to_end(digest)
                return found
            now = time.monotonic()
            refused_at = self._dispatcher.gives_up_at(model, accepted_at=accepted_at)
            if refused_at is not None and refused_at <= now:
                raise self._dispatcher.no_replica(model)
            if deadline <= now:
                raise QueueDeadlineError(
                    "The request's deadline passed before the model's tokenizer was there."
                )
            self._begin(digest)
            await self._changed.wait(min(deadline, refused_at if refused_at is not None else deadline) - now)
        raise ShuttingDownError("This gateway is shutting down.")

    def follow(self) -> None:
        """Starts fetching what the current routing table names and is not known yet."""
        for route in (self._dispatcher.table or {}).values():
            self._begin(route.digest)

    async def close(self) -> None:
        """Ends all fetches."""
        for task in self._fetches.values():
            task.cancel()
        await asyncio.gather(*self._fetches.values(), return_exceptions=True)
        self._fetches.clear()

    def _begin(self, digest: str) -> None:
        if digest and digest not in self._texts and digest not in self._fetches:
            self._fetches[digest] = asyncio.create_task(self._fetch(digest))

    async def _fetch(self, digest: str) -> None:
        backoff = Backoff(first_s=0.1, most_s=2.0)
        try:
            while self._is_wanted(digest):
                if (files := await self._ask(digest)) is not None:
                    await self._keep(digest, files)
                    return
                await self._changed.wait(backoff.next_s())
        finally:
            self._fetches.pop(digest, None)

    def _is_wanted(self, digest: str) -> bool:
        return any(route.digest == digest for route in (self._dispatcher.table or {}).values())

    async def _ask(self, digest: str) -> dict[str, bytes] | None:
        routes = [route for route in (self._dispatcher.table or {}).values() if route.digest == digest]
        for stream in [s for route in routes for s in self._dispatcher.replicas.streams(route)]:
            if stream.connected and (files := await stream.fetch_files(digest)):
                return files
        return None

    async def _keep(self, digest: str, files: dict[str, bytes]) -> None:
        try:
            # Reading a large vocabulary takes a second; tokens of others flow meanwhile.
            self._texts[digest] = await asyncio.to_thread(ModelText, files)
            log.info("tokenizer ready", extra={"digest": digest})
        except ServiceError as error:
            log.error("tokenizer is unusable", extra={"digest": digest, "reason": error.message})
            self._texts[digest] = error
        except Exception:  # whatever a broken file does to a library, requests get an answer
            log.exception("tokenizer is unusable", extra={"digest": digest})
            self._texts[digest] = ServiceError(
                "The model's tokenizer files cannot be used.", code="tokenizer_unusable"
            )
        while len(self._texts) > TEXTS_MAX:
            self._texts.popitem(last=False)
        self._changed.fire()
