"""The other side of the gateway, scripted: an operator and workers on real gRPC over loopback.

They are peers on the wire, not stand-ins for our classes: a `Worker` answers requests with the tokens of a fixed
reply, and a test can make it hold back, hand requests over, give them back, repeat itself or die.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import grpc
import hypothesis
import openai
import pytest
from layercast.engine.v1alpha1 import engine_pb2
from layercast.engine.v1alpha1.engine_pb2_grpc import (
    EngineServiceServicer,
    add_EngineServiceServicer_to_server,
)
from layercast.route.v1alpha1 import route_pb2
from layercast.route.v1alpha1.route_pb2_grpc import RouteServiceServicer, add_RouteServiceServicer_to_server
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from layercast_gateway.dispatcher import Dispatcher
from layercast_gateway.gateway import Gateway
from layercast_gateway.settings import Settings
from layercast_gateway.tokenizer import ModelText

# Loaded machines are slow at times; the limit of a test is pytest's.
hypothesis.settings.register_profile("gateway", deadline=None)
hypothesis.settings.load_profile("gateway")

T = TypeVar("T")

MODEL = "tiny"
DIGEST = "sha256-of-tiny"
DEADLINE_S = 60.0
CORPUS = (
    "the quick brown fox jumps over the lazy dog. Hello world! 日本語 🎉 naïve café STOP END one two three "
)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}"
    "{{ raise_exception('a user speaks first') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_files() -> dict[str, bytes]:
    """The small files of a checkpoint with a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS] * 8, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": {"content": "<|im_end|>"}}).encode(),
        "chat_template.jinja": TEMPLATE.encode(),
        "config.json": json.dumps({"max_position_embeddings": 512}).encode(),
    }


async def within(awaitable: Awaitable[T]) -> T:
    """The result, or a failure of the test after the deadline."""
    return await asyncio.wait_for(awaitable, DEADLINE_S)


def accepted(request: engine_pb2.Request, *, layers_done: int = 0) -> engine_pb2.Event:
    """This worker owns the request."""
    announcement = engine_pb2.Accepted(replica_id="any", layers_done=layers_done)
    return engine_pb2.Event(request_id=request.request_id, attempt=request.attempt, accepted=announcement)


def tokens(request: engine_pb2.Request, position: int, ids: Sequence[int]) -> engine_pb2.Event:
    """Tokens from a position on; the log-probability of a token is -id / 100 when asked for."""
    logprobs = [
        engine_pb2.TokenLogprobs(
            logprob=-i / 100,
            top=[engine_pb2.Candidate(token_id=i, logprob=-i / 100)] * request.sampling.top_logprobs,
        )
        for i in ids
        if request.sampling.logprobs
    ]
    news = engine_pb2.Tokens(position=position, token_ids=ids, logprobs=logprobs)
    return engine_pb2.Event(request_id=request.request_id, attempt=request.attempt, tokens=news)


def finished(request: engine_pb2.Request, reason: int = engine_pb2.FINISH_REASON_STOP) -> engine_pb2.Event:
    """The request ended well."""
    end = engine_pb2.Finished(reason=engine_pb2.FinishReason.ValueType(reason))
    return engine_pb2.Event(request_id=request.request_id, attempt=request.attempt, finished=end)


def returned(request: engine_pb2.Request) -> engine_pb2.Event:
    """The worker gives the request back."""
    back = engine_pb2.Returned(reason="draining")
    return engine_pb2.Event(request_id=request.request_id, attempt=request.attempt, returned=back)


def failed(request: engine_pb2.Request, *, client_fault: bool) -> engine_pb2.Event:
    """The worker cannot serve the request."""
    why = engine_pb2.Failed(client_fault=client_fault, message="out of luck")
    return engine_pb2.Event(request_id=request.request_id, attempt=request.attempt, failed=why)


class Worker(EngineServiceServicer):
    """One scripted worker. With `automatic` it answers every request with `reply`, else the test does by `send`."""

    def __init__(self, *, files: dict[str, bytes], reply: Sequence[int] = (), automatic: bool = True) -> None:
        self.files = files
        self.reply = list(reply)
        self.automatic = automatic
        self.submits: asyncio.Queue[engine_pb2.Request] = asyncio.Queue()
        self.cancels: asyncio.Queue[engine_pb2.Cancel] = asyncio.Queue()
        self.connected = asyncio.Event()
        self.hellos: list[str] = []
        self.address = ""
        self._out: asyncio.Queue[engine_pb2.GenerateResponse] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None

    async def start(self, *, port: int = 0) -> None:
        """Serves; on the same port again after `die`."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_EngineServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self._server.start()

    async def die(self) -> None:
        """Breaks every stream and refuses new ones."""
        self.connected.clear()
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)

    async def revive(self) -> None:
        """The same worker, restarted: it remembers nothing."""
        await self.start(port=int(self.address.rpartition(":")[2]))

    def send(self, *events: engine_pb2.Event, kv: tuple[int, int] = (0, 0)) -> None:
        """One message with these events, and (used, all) pages."""
        use = engine_pb2.KvUse(used=kv[0], total=kv[1])
        self._out.put_nowait(engine_pb2.GenerateResponse(events=events, kv=use))

    def play(self, request: engine_pb2.Request, count: int | None = None) -> None:
        """Executes a request honestly: its first `count` steps, or all."""
        for step in self.events_of(request)[:count]:
            self.send(*step)

    async def submit(self) -> engine_pb2.Request:
        """The next request that this worker is given."""
        return await within(self.submits.get())

    async def cancel(self) -> engine_pb2.Cancel:
        """The next cancellation."""
        return await within(self.cancels.get())

    def events_of(self, request: engine_pb2.Request) -> list[list[engine_pb2.Event]]:
        """The steps of an honest execution: Accepted, a token each, Finished with the last."""
        done = len(request.generated_token_ids)
        wanted = self.reply[: request.sampling.max_tokens]
        steps = [[accepted(request)]]
        steps += [[tokens(request, p, [wanted[p]])] for p in range(done, len(wanted))]
        stopped = bool(wanted) and wanted[-1] in request.sampling.stop_token_ids
        end = engine_pb2.FINISH_REASON_STOP if stopped else engine_pb2.FINISH_REASON_LENGTH
        steps[-1].append(finished(request, end))
        return steps

    async def Generate(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[engine_pb2.GenerateResponse]:
        """As engine.proto says."""
        self._out = asyncio.Queue()
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            while True:
                yield await self._out.get()
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _read(self, commands: Any) -> None:
        async for command in commands:
            kind = command.WhichOneof("command")
            if kind == "hello":
                self.hellos.append(command.hello.gateway_id)
                self.connected.set()
            elif kind == "cancel":
                self.cancels.put_nowait(command.cancel)
            else:
                self.submits.put_nowait(command.submit.request)
                if self.automatic:
                    self.play(command.submit.request)

    async def GetModelFiles(self, request: Any, context: Any) -> engine_pb2.GetModelFilesResponse:
        """As engine.proto says."""
        if request.digest != DIGEST or not self.files:
            await context.abort(grpc.StatusCode.NOT_FOUND, "not held here")
        return engine_pb2.GetModelFilesResponse(files=self.files)


class Operator(RouteServiceServicer):
    """The scripted operator: it tells its table to every watcher, at once and after each change."""

    def __init__(self) -> None:
        self._table = route_pb2.WatchRoutesResponse()
        self._version = 0
        self._changed = asyncio.Condition()
        self._server: grpc.aio.Server | None = None
        self.address = ""

    async def start(self, *, port: int = 0) -> None:
        """Serves."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_RouteServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self._server.start()

    async def die(self) -> None:
        """Is away."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)

    async def publish(
        self,
        *endpoints: tuple[Worker, str],
        context: int = 512,
        message: str = "",
        roles: Sequence[str] = (),
    ) -> None:
        """A table with one model; states and roles are the names of route.proto without their prefix."""
        role_of = dict(zip((worker.address for worker, _ in endpoints), roles, strict=False))
        route = route_pb2.ModelRoute(
            model=MODEL,
            digest=DIGEST,
            context_length_max=context,
            message=message,
            created_unix_s=1_700_000_000,
            endpoints=[
                route_pb2.Endpoint(
                    replica_id=f"replica-{worker.address}",
                    address=worker.address,
                    state=route_pb2.EndpointState.Value(f"ENDPOINT_STATE_{state}"),
                    role=route_pb2.EndpointRole.Value(
                        f"ENDPOINT_ROLE_{role_of.get(worker.address, 'UNSPECIFIED')}"
                    ),
                )
                for worker, state in endpoints
            ],
        )
        await self.publish_table(route_pb2.WatchRoutesResponse(models=[route]))

    async def publish_table(self, table: route_pb2.WatchRoutesResponse) -> None:
        """Any table."""
        async with self._changed:
            self._table = table
            self._version += 1
            self._changed.notify_all()

    async def WatchRoutes(self, request: Any, context: Any) -> AsyncIterator[route_pb2.WatchRoutesResponse]:
        """As route.proto says."""
        seen = 0
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._version > seen)  # noqa: B023
                seen, table = self._version, self._table
            yield table


@dataclass
class World:
    """A gateway with its operator, workers and clients."""

    files: dict[str, bytes]
    text: ModelText
    operator: Operator = field(default_factory=Operator)
    gateways: list[Gateway] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    clients: list[openai.AsyncOpenAI] = field(default_factory=list)
    http: aiohttp.ClientSession | None = None

    async def worker(
        self, reply: str = "Hello world!", *, automatic: bool = True, end: bool = True
    ) -> Worker:
        """A running worker that answers with a text; `end` appends the end-of-sequence token."""
        ids = [*self.text.encode(reply), *(self.text.stop_token_ids if end else ())]
        worker = Worker(files=self.files, reply=ids, automatic=automatic)
        await worker.start()
        self.workers.append(worker)
        return worker

    async def gateway(self, **settings: Any) -> Gateway:
        """A running gateway on a free port."""
        fast = {"silence_s": 0.2, "no_replica_wait_s": 5.0, "request_deadline_s": 20.0}
        gateway = Gateway(
            Settings(listen="127.0.0.1:0", operator=self.operator.address, **{**fast, **settings})
        )
        await gateway.start()
        self.gateways.append(gateway)
        return gateway

    async def serving(self, *workers: Worker, **settings: Any) -> openai.AsyncOpenAI:
        """A client of a gateway that these workers serve, all connected."""
        await self.operator.publish(*((worker, "SERVING") for worker in workers))
        client = self.client(await self.gateway(**settings))
        for worker in workers:
            await within(worker.connected.wait())
        return client

    def client(self, gateway: Gateway) -> openai.AsyncOpenAI:
        """The official client; it does not try again, so that tests see every answer."""
        client = openai.AsyncOpenAI(
            base_url=f"http://{gateway.address}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S
        )
        self.clients.append(client)
        return client

    async def get(self, gateway: Gateway, path: str) -> tuple[int, str]:
        """Status and body of a plain GET."""
        async with self.session().get(f"http://{gateway.address}{path}") as response:
            return response.status, await response.text()

    async def post(self, gateway: Gateway, path: str, body: bytes) -> tuple[int, Any, Any]:
        """Status, JSON body and headers of a plain POST."""
        async with self.session().post(f"http://{gateway.address}{path}", data=body) as response:
            return response.status, await response.json(), response.headers

    async def until(self, gateway: Gateway, predicate: Callable[[Dispatcher], bool]) -> None:
        """Returns when the gateway's routes and connections are as wanted."""
        async with asyncio.timeout(DEADLINE_S):
            while not predicate(gateway.dispatcher):
                await gateway.dispatcher.changed.wait(DEADLINE_S)

    async def metric(self, name: str) -> float:
        """The value of a metric of the model at the first gateway."""
        _, body = await self.get(self.gateways[0], "/metrics")
        start = f'layercast_gateway_{name}{{model="{MODEL}"}}'
        return float(next(line for line in body.splitlines() if line.startswith(start)).split()[-1])

    async def metric_reaches(self, name: str, value: float) -> None:
        """Returns when a gauge has risen so far; the gateway tells of it only when asked."""
        async with asyncio.timeout(DEADLINE_S):
            while await self.metric(name) < value:
                await asyncio.sleep(0)

    def session(self) -> aiohttp.ClientSession:
        """One plain HTTP session, closed with the world."""
        if self.http is None:
            self.http = aiohttp.ClientSession()
        return self.http

    async def close(self) -> None:
        """Ends everything."""
        for client in self.clients:
            await client.close()
        if self.http is not None:
            await self.http.close()
        for worker in self.workers:
            await worker.die()
        await self.operator.die()
        for gateway in self.gateways:
            await within(gateway.stop())


@pytest.fixture(scope="session")
def files() -> dict[str, bytes]:
    """The checkpoint's small files."""
    return build_files()


@pytest.fixture(scope="session")
def text(files: dict[str, bytes]) -> ModelText:
    """The text side of the checkpoint."""
    return ModelText(files)


@pytest.fixture
async def world(files: dict[str, bytes], text: ModelText) -> AsyncIterator[World]:
    """An operator that runs, and what the test adds to it."""
    world = World(files, text)
    await world.operator.start()
    yield world
    await world.close()
