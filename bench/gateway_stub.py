"""A worker stub on the wire, and the operator that tells of it: the other end of a gateway under measurement.

The stub executes nothing. Like a worker it takes steps, though shorter ones than any engine: each step answers every
running request with its next token, all of them in one message. Without the pause between steps a request would be
answered before the next one came, and a message would carry one token, which is a different load: that of an engine
without batches. It says its addresses as one JSON line and serves until its stdin ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import uvloop
from layercast.engine.v1alpha1 import engine_pb2
from layercast.engine.v1alpha1.engine_pb2_grpc import (
    EngineServiceServicer,
    add_EngineServiceServicer_to_server,
)
from layercast.route.v1alpha1 import route_pb2
from layercast.route.v1alpha1.route_pb2_grpc import RouteServiceServicer, add_RouteServiceServicer_to_server

MODEL = "stub"
DIGEST = "sha256-of-stub"
CONTEXT = 2048
TOKENS = (504, 2365, 282, 260, 905, 314, 338)
"""What every answer says, again and again: words of SmolLM2's vocabulary."""


class Running:
    """A request of which some tokens are still to be sent."""

    def __init__(self, request: engine_pb2.Request) -> None:
        self.request_id = request.request_id
        self.attempt = request.attempt
        self.wanted = request.sampling.max_tokens
        self.position = len(request.generated_token_ids)

    def step(self) -> list[engine_pb2.Event]:
        """The next token; `Accepted` before the first, `Finished` behind the last."""
        events = []
        if self.position == 0:
            events.append(self._event(accepted=engine_pb2.Accepted(replica_id="stub")))
        token = TOKENS[self.position % len(TOKENS)]
        events.append(self._event(tokens=engine_pb2.Tokens(position=self.position, token_ids=[token])))
        self.position += 1
        if self.over:
            reason = engine_pb2.FINISH_REASON_LENGTH
            events.append(self._event(finished=engine_pb2.Finished(reason=reason)))
        return events

    @property
    def over(self) -> bool:
        """Whether it has all its tokens."""
        return self.position >= self.wanted

    def _event(self, **what: Any) -> engine_pb2.Event:
        return engine_pb2.Event(request_id=self.request_id, attempt=self.attempt, **what)


class Stub(EngineServiceServicer):
    """The worker."""

    def __init__(self, files: dict[str, bytes], *, step_s: float) -> None:
        self._files = files
        self._step_s = step_s

    async def GetModelFiles(self, request: Any, context: Any) -> engine_pb2.GetModelFilesResponse:
        """As engine.proto says."""
        return engine_pb2.GetModelFilesResponse(files=self._files)

    async def Generate(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[engine_pb2.GenerateResponse]:
        """One step after the other while anything runs."""
        running: dict[str, Running] = {}
        work = asyncio.Event()
        reader = asyncio.create_task(self._read(request_iterator, running, work))
        next_at = 0.0
        try:
            while True:
                await work.wait()
                await asyncio.sleep(max(0.0, next_at - time.monotonic()))
                next_at = time.monotonic() + self._step_s
                events = [event for each in list(running.values()) for event in each.step()]
                for request_id in [name for name, each in running.items() if each.over]:
                    del running[request_id]
                if not running:
                    work.clear()
                yield engine_pb2.GenerateResponse(events=events)
        finally:
            reader.cancel()

    async def _read(self, commands: Any, running: dict[str, Running], work: asyncio.Event) -> None:
        async for command in commands:
            if command.WhichOneof("command") == "submit":
                request = command.submit.request
                running[request.request_id] = Running(request)
                work.set()
            elif command.WhichOneof("command") == "cancel":
                running.pop(command.cancel.request_id, None)


class Routes(RouteServiceServicer):
    """The operator: one table that never changes."""

    def __init__(self, worker: str) -> None:
        endpoint = route_pb2.Endpoint(
            replica_id="stub", address=worker, state=route_pb2.ENDPOINT_STATE_SERVING
        )
        route = route_pb2.ModelRoute(
            model=MODEL, digest=DIGEST, context_length_max=CONTEXT, endpoints=[endpoint]
        )
        self._table = route_pb2.WatchRoutesResponse(models=[route])

    async def WatchRoutes(self, request: Any, context: Any) -> AsyncIterator[route_pb2.WatchRoutesResponse]:
        """As route.proto says."""
        yield self._table
        await asyncio.Event().wait()


async def serve(model_dir: Path, *, step_s: float) -> None:
    """Serve until the end of stdin."""
    names = ("tokenizer.json", "tokenizer_config.json", "config.json")
    files = {name: (model_dir / name).read_bytes() for name in names if (model_dir / name).exists()}
    server = grpc.aio.server()
    add_EngineServiceServicer_to_server(Stub(files, step_s=step_s), server)
    worker = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    operator = grpc.aio.server()
    add_RouteServiceServicer_to_server(Routes(worker), operator)
    routes = f"127.0.0.1:{operator.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    await operator.start()
    sys.stdout.write(json.dumps({"worker": worker, "operator": routes}) + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)
    await operator.stop(0)


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1]), step_s=float(sys.argv[2])))
