"""Demand from Prometheus: how it joins the gateways' own, and what a Prometheus on loopback is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from layercast_operator.errors import PrometheusError
from layercast_operator.metrics import Metrics
from layercast_operator.modelservice import Band, Queries, ScalePolicy, Scaling, ScalingMode
from layercast_operator.policy import KvUse, PolicyInput, Rule, decide
from layercast_operator.prometheus import Prometheus
from layercast_operator.prometheus_demand import FIELDS, MISSING_AFTER_S, SHIPPED, Answers, Told, joined
from layercast_operator.snapshot import Demand

NOW = 1000.0


def fast(tokens: float = 0, *, complete: bool = True) -> Demand:
    return Demand(
        prompt_tokens_waiting=tokens,
        requests_waiting=1,
        requests_in_flight=1,
        complete=complete,
        problem="" if complete else "silent: g",
    )


def answers(
    tokens: float | None = 0.0, *, at: float = NOW, since: float | None = None, problem: str = ""
) -> Answers:
    values = dict.fromkeys(FIELDS, 0.0) | {FIELDS[0]: tokens}
    return Answers(at=at, by_model={"m": Told(values=values, missing_since=since, problem=problem)})


def both(given: Demand | None, told: Answers, *, gateways: bool = True) -> Demand | None:
    return joined(given, told, model="m", now=NOW, age_max_s=15, gateways=gateways)


@pytest.mark.parametrize(("one", "other"), [(700.0, 20.0), (20.0, 700.0)])
def test_growth_follows_whichever_calls_for_more(one: float, other: float) -> None:
    got = both(fast(one), answers(other))
    assert got is not None and got.prompt_tokens_waiting == 700 and got.complete


UNKNOWN = [
    (answers(at=NOW - 16), "PrometheusSilent"),
    (Answers(at=NOW), "PrometheusSilent"),
    (answers(None, since=NOW - 5), "SeriesAwaited"),
    (answers(None, since=NOW - MISSING_AFTER_S), "NoSeries"),
    (answers(problem="parse error"), "BadExpression"),
]


@pytest.mark.parametrize(("told", "reason"), UNKNOWN)
def test_what_prometheus_does_not_know_shrinks_nothing_and_says_why(told: Answers, reason: str) -> None:
    got = both(fast(300), told)
    assert got is not None
    assert (got.complete, got.reason) == (False, reason) and got.problem
    assert got.prompt_tokens_waiting == 300, "the gateways' own numbers still count"


@pytest.mark.parametrize("told", [answers(), *(told for told, _ in UNKNOWN)])
def test_a_held_request_starts_a_service_at_zero_whatever_prometheus_says(told: Answers) -> None:
    queue = Band(low=0.5, high=0.7)
    scaling = Scaling(
        replicas_min=0,
        replicas_max=3,
        mode=ScalingMode.AUTO,
        policy=ScalePolicy.LIVE,
        queue_s=queue,
        kv_utilization=queue,
        prefill_tokens_per_s=0,
        scale_down_s=30,
    )
    given = PolicyInput(
        now=NOW,
        current=0,
        capacity=3,
        demand=both(fast(300), told),
        kv=KvUse(used=0, pages_per_replica=1),
        prefill_tokens_per_s=None,
        load_time_s=None,
        below_since=None,
    )
    decision = decide(scaling, given)
    assert (decision.replicas, decision.rule) == (1, Rule.FROM_ZERO)


def test_a_silent_gateway_is_not_made_up_for() -> None:
    got = both(fast(complete=False), answers())
    assert got is not None and not got.complete and "silent: g" in got.problem
    alone = both(None, answers(40.0))
    assert alone is not None and not alone.complete and alone.prompt_tokens_waiting == 40


def test_prometheus_alone_is_enough_where_no_gateway_is_ours() -> None:
    got = both(None, answers(40.0), gateways=False)
    assert got is not None and got.complete and got.prompt_tokens_waiting == 40
    assert both(None, Answers(at=0.0), gateways=False) is None


class FakePrometheus:
    """Answers what the test says, as Prometheus does."""

    def __init__(self) -> None:
        self.vectors: dict[str, list[dict[str, Any]]] = {}
        self.refused: dict[str, str] = {}
        self.away = False
        self.asked: list[str] = []

    async def query(self, request: web.Request) -> web.Response:
        query = str((await request.post())["query"])
        self.asked.append(query)
        if self.away:
            return web.Response(status=503, text="starting")
        if query in self.refused:
            return web.json_response({"status": "error", "error": self.refused[query]}, status=400)
        data = {"resultType": "vector", "result": self.vectors.get(query, [])}
        return web.json_response({"status": "success", "data": data})

    def gauge(self, name: str, **by_model: float) -> None:
        self.vectors[SHIPPED[name]] = [
            {"metric": {"model": model}, "value": [NOW, str(value)]} for model, value in by_model.items()
        ]


@pytest.fixture
async def fake() -> AsyncIterator[tuple[FakePrometheus, Callable[..., Prometheus]]]:
    server = FakePrometheus()
    app = web.Application()
    app.add_routes([web.post("/api/v1/query", server.query)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made: list[Prometheus] = []

    def client(**models: Queries) -> Prometheus:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        one = Prometheus(url=url, every_s=1, clock=lambda: NOW, metrics=Metrics(), models=models)
        made.append(one)
        return one

    yield server, client
    for one in made:
        await one.close()
    await runner.cleanup()


async def test_three_questions_serve_all_models(fake: Any) -> None:
    server, client = fake
    for name in FIELDS:
        server.gauge(name, a=3, b=4)
    asked = client(a=Queries(), b=Queries(), c=Queries())
    await asked.round()
    assert asked.answers.by_model["b"].values == dict.fromkeys(FIELDS, 4.0)
    assert asked.answers.by_model["c"].missing_since == NOW
    assert len(server.asked) == len(FIELDS) + 1, "one for each number, and the latency"


async def test_an_expression_of_its_own_replaces_the_shipped_one(fake: Any) -> None:
    server, client = fake
    for name in FIELDS:
        server.gauge(name, m=1)
    mine = 'sum(queue{service="m"})'
    server.vectors[mine] = [{"metric": {}, "value": [NOW, "5"]}, {"metric": {}, "value": [NOW, "NaN"]}]
    asked = client(m=Queries(prompt_tokens_waiting='sum(queue{service="$model"})'))
    await asked.round()
    assert asked.answers.by_model["m"].values == dict.fromkeys(FIELDS, 1.0) | {FIELDS[0]: 5.0}


async def test_a_wrong_expression_is_that_models_problem_alone(fake: Any) -> None:
    server, client = fake
    for name in FIELDS:
        server.gauge(name, good=1)
    server.refused["sum("] = "unexpected end of input"
    asked = client(good=Queries(), bad=Queries(requests_waiting="sum("))
    await asked.round()
    assert "unexpected end of input" in asked.answers.by_model["bad"].problem
    assert asked.answers.by_model["good"].missing_since is None


async def test_prometheus_that_is_away_leaves_the_last_answers_to_grow_old(fake: Any) -> None:
    server, client = fake
    for name in FIELDS:
        server.gauge(name, m=1)
    asked = client(m=Queries())
    await asked.round()
    server.away = True
    with pytest.raises(PrometheusError, match="503"):
        await asked.round()
    assert asked.answers.at == NOW and asked.answers.by_model["m"].values[FIELDS[0]] == 1
