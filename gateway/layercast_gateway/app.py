"""The HTTP face: OpenAI's endpoints, health and metrics.

A handler reads and checks the request, has it tokenised, hands one piece of work per choice to the dispatcher and
writes what the choices say. Headers of a stream are sent with its first text, so that whatever goes wrong before it
still has an honest status code.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from layercast_gateway import answers
from layercast_gateway.answers import AnswerShape, ChoiceText, EventStream
from layercast_gateway.dispatcher import Dispatcher
from layercast_gateway.errors import ClientError, GatewayError, RetryLaterError, ShuttingDownError
from layercast_gateway.intake import Job, begin
from layercast_gateway.key_ring import KeyRing, allow
from layercast_gateway.metrics import UNKNOWN_MODEL, Metrics
from layercast_gateway.openai import GenerationRequest, parse_chat, parse_completion
from layercast_gateway.settings import Settings
from layercast_gateway.texts import Texts

log = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""The code in metrics of a request whose client closed the connection."""

PROMETHEUS_TEXT = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}

SSE_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    """Handlers of one gateway."""

    def __init__(
        self, *, settings: Settings, dispatcher: Dispatcher, texts: Texts, metrics: Metrics, ring: KeyRing
    ) -> None:
        self._ring = ring
        self._settings = settings
        self._dispatcher = dispatcher
        self._texts = texts
        self._metrics = metrics
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.leaving = False
        """Set when the process is to end: readiness is denied, new requests are still taken."""
        self.closing = False
        """Set when it ends: new requests are refused."""

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=self._settings.body_bytes_max, middlewares=[_openai_errors])
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.get("/v1/models/{model:.+}", self._model),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._completions),
                web.get("/metrics", self._render_metrics),
                web.get("/metrics/inference-pool", self._render_pool_metrics),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
            ]
        )
        app.on_response_prepare.append(self._last_of_its_connection)
        return app

    async def _last_of_its_connection(self, _: web.Request, response: web.StreamResponse) -> None:
        """Connections that are kept would end under a client's next request; told now, it opens a new one elsewhere."""
        if self.leaving:
            response.force_close()
            response.headers["Connection"] = "close"  # the library has written its own before it calls this

    async def until_idle(self) -> None:
        """Returns when no request is in flight."""
        await self._idle.wait()

    async def _models(self, request: web.Request) -> web.Response:
        key = self._ring.known(authorization(request))
        table = self._dispatcher.table
        if table is None:
            raise RetryLaterError("This gateway has no routing table yet.")
        data = [
            answers.model_body(name=route.model, created_unix_s=route.created_unix_s)
            for _, route in sorted(table.items())
            if key is None or not key.models or route.model in key.models
        ]
        return _json({"object": "list", "data": data})

    async def _model(self, request: web.Request) -> web.Response:
        allow(self._ring.known(authorization(request)), request.match_info["model"])
        route = self._dispatcher.route(request.match_info["model"])
        return _json(answers.model_body(name=route.model, created_unix_s=route.created_unix_s))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._counted(request, parse_chat)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._counted(request, parse_completion)

    async def _counted(
        self, request: web.Request, parse: Callable[[bytes], GenerationRequest]
    ) -> web.StreamResponse:
        """Serves a generation and counts how it ended."""
        label: dict[str, str] = {"model": UNKNOWN_MODEL, "code": "500"}
        self._active += 1
        self._idle.clear()
        try:
            if self.closing:
                raise ShuttingDownError("This gateway is shutting down.")
            # Before the body is read: who may not ask costs nothing.
            with self._ring.using(authorization(request)) as key:
                wanted = parse(await request.read())
                allow(key, wanted.model)
                label["model"] = self._dispatcher.route(wanted.model).model
                response, code = await self._generate(request, wanted)
            label["code"] = str(code)
            return response
        except GatewayError as error:
            label["code"] = str(error.status)
            raise
        except web.HTTPException as error:
            label["code"] = str(error.status)
            raise
        except (asyncio.CancelledError, ConnectionResetError):
            label["code"] = str(CLIENT_LEFT)
            raise
        finally:
            self._metrics.ended(**label)
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def _generate(
        self, request: web.Request, wanted: GenerationRequest
    ) -> tuple[web.StreamResponse, int]:
        """The answer and the code to count: a stream that ends with an error has sent 200 already."""
        job = await begin(wanted, settings=self._settings, dispatcher=self._dispatcher, texts=self._texts)
        shape = AnswerShape(
            kind=wanted.kind,
            answer_id=("chatcmpl-" if wanted.messages else "cmpl-") + secrets.token_hex(16),
            model=wanted.model,
            created_unix_s=int(time.time()),
            logprobs=wanted.logprobs,
            include_usage=wanted.include_usage,
        )
        try:
            if wanted.stream:
                return await self._stream(request, job, shape)
            return await self._whole(job, shape), 200
        finally:
            job.abandon()  # after a good end there is nothing left to abandon

    async def _whole(self, job: Job, shape: AnswerShape) -> web.Response:
        choices = [ChoiceText(text=echo) for echo in job.echoes]
        running = len(choices)
        while running:
            for piece in await job.pieces.take():
                if piece.error is not None:
                    raise piece.error
                choices[piece.index].add(piece)
                running -= piece.last
        return _json(shape.body(choices, job.usage()))

    async def _stream(
        self, request: web.Request, job: Job, shape: AnswerShape
    ) -> tuple[web.StreamResponse, int]:
        """All that is known at a time goes out in one write: each one is a call of the kernel."""
        response = web.StreamResponse(headers=SSE_HEADERS)
        stream, events = EventStream(shape, job.echoes), b""
        while stream.running:
            events = stream.take(await job.pieces.take())
            if stream.error is not None and not (response.prepared or events):
                raise stream.error
            if not response.prepared:
                await response.prepare(request)
            if stream.running:
                await response.write(events)
        if stream.error is None:
            await response.write_eof(events + shape.closing(job.usage()))
            return response, 200
        log.warning("a stream ended with an error", extra={"reason": stream.error.message})
        await response.write_eof(events + answers.event(answers.error_body(stream.error)))
        return response, stream.error.status

    async def _render_metrics(self, request: web.Request) -> web.Response:
        """All series, or those of `?name[]=`: the operator asks for three, many times a second."""
        body = self._metrics.render(self._dispatcher.demands(), request.query.getall("name[]", []))
        return web.Response(body=body, headers=PROMETHEUS_TEXT)

    async def _render_pool_metrics(self, _: web.Request) -> web.Response:
        """For the endpoint picker of an InferencePool that has the gateways as endpoints."""
        kv_utilization = self._dispatcher.replicas.kv_utilization
        body = self._metrics.render_pool(self._dispatcher.demands(), kv_utilization=kv_utilization)
        return web.Response(body=body, headers=PROMETHEUS_TEXT)

    async def _healthz(self, _: web.Request) -> web.Response:
        return _json({"alive": True})

    async def _readyz(self, _: web.Request) -> web.Response:
        """Ready with a routing table: a request for a model without replicas waits for one, that is service too."""
        table = self._dispatcher.table
        found = {model: self._dispatcher.available(model) for model in table or ()}
        models = {model: {"serving": a.serving, "coming": a.coming} for model, a in sorted(found.items())}
        leaving = self.leaving or self.closing
        if leaving:
            reason = "this gateway is shutting down"
        elif table is None:
            reason = "no routing table from the operator yet"
        elif any(a.serving for a in found.values()):
            reason = "routing table known, at least one model has a serving replica"
        else:
            reason = "routing table known, no model has a serving replica"
        ready = table is not None and not leaving
        body = {"ready": ready, "reason": reason, "routes_known": table is not None, "models": models}
        return _json(body, status=200 if ready else 503)


def authorization(request: web.Request) -> str:
    """The header that carries the key; empty without one."""
    return request.headers.get("Authorization", "")


def _json(body: dict[str, Any], *, status: int = 200) -> web.Response:
    return web.Response(body=answers.encode(body), status=status, content_type="application/json")


def _error_response(error: GatewayError) -> web.Response:
    response = _json(answers.error_body(error), status=error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response


@web.middleware
async def _openai_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every answer other than the wanted one has OpenAI's shape."""
    try:
        return await handler(request)
    except GatewayError as error:
        return _error_response(error)
    except web.HTTPRequestEntityTooLarge as error:
        message = f"The body is larger than {request.client_max_size} bytes."
        return _error_response(ClientError(message, code="body_too_large", status=error.status))
    except web.HTTPException as error:
        message = f"{request.method} {request.path}: {error.reason}."
        response = _error_response(ClientError(message, status=error.status))
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except ConnectionResetError:
        return web.Response(
            status=CLIENT_LEFT
        )  # nobody reads it; raised, the library would log it as a defect
    except Exception:
        log.exception("a request failed", extra={"path": request.path})
        return _error_response(GatewayError("Internal error."))
