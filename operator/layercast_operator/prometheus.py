"""Asks Prometheus, round after round: three questions for all models, more for those with expressions of their own."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp

from layercast_operator.errors import PrometheusError
from layercast_operator.metrics import Metrics
from layercast_operator.modelservice import Queries
from layercast_operator.prometheus_demand import (
    FIELDS,
    SHIPPED,
    TTFT_P99,
    Answers,
    Told,
    expression,
    next_told,
)

_LOG = logging.getLogger(__name__)

QUERY_DEADLINE_S = 5.0
AT_ONCE = 4
ANSWER_BYTES_MAX = 8 << 20
BAD_REQUEST = 400


@dataclass(slots=True, kw_only=True)
class Prometheus:
    """One Prometheus. `answers` is the newest; `models` says what to ask for."""

    url: str
    every_s: float
    clock: Callable[[], float]
    metrics: Metrics
    token_file: Path | None = None
    answers: Answers = field(default_factory=lambda: Answers(at=0.0))
    models: Mapping[str, Queries] = field(default_factory=dict)
    _session: aiohttp.ClientSession | None = None
    _task: asyncio.Task[None] | None = None

    @property
    def age_max_s(self) -> float:
        """Older answers are unknown."""
        return 3 * self.every_s + QUERY_DEADLINE_S

    def start(self) -> None:
        """Begin to ask."""
        self._task = asyncio.create_task(self._run(), name="prometheus")

    async def close(self) -> None:
        """Stop asking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _run(self) -> None:
        while True:
            try:
                await self.round()
            except PrometheusError as error:
                self.metrics.prometheus_failures.inc()
                if not self.answers.problem:
                    _LOG.warning("Prometheus does not answer", extra={"problem": str(error)})
                self.answers = replace(self.answers, problem=str(error))
            except Exception:
                _LOG.exception("a round of questions ended by an exception")
            await asyncio.sleep(self.every_s)

    async def round(self) -> None:
        """One round. Raises PrometheusError when Prometheus is away."""
        asked_at, models = self.clock(), dict(self.models)
        shipped = {name: await self._by_model(SHIPPED[name]) for name in FIELDS}
        latency = await self._by_model(TTFT_P99)
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(model: str, queries: Queries) -> tuple[str, Told]:
            async with limit:
                told = await self._one(model, queries, shipped, asked_at)
            return model, replace(told, ttft_p99_s=latency.get(model))

        told = await asyncio.gather(*(one(model, queries) for model, queries in models.items()))
        self.answers = Answers(at=asked_at, by_model=dict(told))

    async def _one(
        self, model: str, queries: Queries, shipped: Mapping[str, Mapping[str, float]], now: float
    ) -> Told:
        before = self.answers.by_model.get(model)
        values: dict[str, float | None] = {}
        for name in FIELDS:
            own = expression(queries, name, model)
            try:
                values[name] = await self._single(own) if own else shipped[name].get(model)
            except PrometheusError as error:
                if not error.ours:
                    raise
                return Told(problem=f"{own}: {error}")
        return next_told(before, values, now=now)

    async def _by_model(self, query: str) -> dict[str, float]:
        found = {}
        for sample in await self._query(query):
            value = _number(sample.get("value"))
            if value is not None:
                found[str((sample.get("metric") or {}).get("model", ""))] = value
        return found

    async def _single(self, query: str) -> float | None:
        """The sum of what an expression gives; None when it gives nothing."""
        values = [_number(sample.get("value")) for sample in await self._query(query)]
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    async def _query(self, query: str) -> list[dict[str, Any]]:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=QUERY_DEADLINE_S)
            self._session = aiohttp.ClientSession(timeout=timeout, trust_env=False)
        try:
            async with self._session.post(
                f"{self.url.rstrip('/')}/api/v1/query", data={"query": query}, headers=self._headers()
            ) as answer:
                status = answer.status
                content = await answer.json(content_type=None) if status in (200, BAD_REQUEST) else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise PrometheusError(f"{self.url}: {error!r}", ours=False) from error
        if status == BAD_REQUEST and isinstance(content, dict):
            raise PrometheusError(str(content.get("error", "bad request")), ours=True)
        data = content.get("data") if isinstance(content, dict) else None
        if status != 200 or not isinstance(data, dict):
            raise PrometheusError(f"{self.url}: it answered {status}", ours=False)
        if data.get("resultType") == "scalar":
            return [{"metric": {}, "value": data.get("result")}]
        if data.get("resultType") != "vector":
            raise PrometheusError(f"it gives a {data.get('resultType')}, not a vector", ours=True)
        return list(data.get("result") or ())

    def _headers(self) -> dict[str, str]:
        if self.token_file is None:
            return {}
        try:
            token = self.token_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise PrometheusError(f"its token cannot be read: {error}", ours=False) from error
        return {"Authorization": f"Bearer {token}"}


def _number(value: object) -> float | None:
    """The number of a sample, at least 0; None for NaN and what is no sample."""
    try:
        number = float(value[1])  # type: ignore[index]
    except (TypeError, ValueError, IndexError, KeyError):
        return None
    return max(number, 0.0) if math.isfinite(number) else None
