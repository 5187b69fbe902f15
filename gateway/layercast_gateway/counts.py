"""What the requests of a gateway add up to: demand by model, and how much each worker holds. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from layercast_gateway.metrics import Demand
from layercast_gateway.replay import Phase, RequestState
from layercast_gateway.replicas import Occupation


def demands(
    states: Iterable[RequestState], reserved: Mapping[str, int], *, models: Iterable[str]
) -> list[Demand]:
    """Demand by model, of `models` also where there is none. `reserved` are places of requests still being read."""
    waiting, in_flight = Counter(reserved), Counter(reserved)
    prompt_tokens: Counter[str] = Counter()
    for state in states:
        work = state.work
        in_flight[work.model] += 1
        if not state.tokens:
            waiting[work.model] += 1
            prompt_tokens[work.model] += len(work.prompt)
    return [
        Demand(
            model=model,
            prompt_tokens_waiting=prompt_tokens[model],
            requests_waiting=waiting[model],
            requests_in_flight=in_flight[model],
        )
        for model in sorted({*models, *in_flight})
    ]


def occupations(states: Iterable[RequestState], serving: Collection[str]) -> dict[str, Occupation]:
    """What counts against whom: a request counts where it was given to, or at the serving replica that took it.

    One that is on its way to where it decodes is in flight there too.
    """
    unstarted: Counter[str] = Counter()
    in_flight: Counter[str] = Counter()
    dispatched = Phase.DISPATCHED
    for state in states:
        if state.phase is dispatched:
            at = state.owner if state.owner in serving else state.given_to
            if at is not None:
                in_flight[at] += 1
                unstarted[at] += not state.started
            if state.decode_at is not None and state.decode_at[1] != at:
                in_flight[state.decode_at[1]] += 1
    return {a: Occupation(unstarted=unstarted[a], in_flight=in_flight[a]) for a in in_flight}
