"""Estimates begin with what is stated, learn from what happened, and are told with it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercast_operator.crd import crd
from layercast_operator.estimators import (
    RATIO_MAX,
    START_S,
    Correction,
    Prediction,
    What,
    factor_of,
    learned,
    predict,
)
from layercast_operator.history import memory_of, scale_json
from layercast_operator.metrics import Metrics
from layercast_operator.timelines import ScaledReplica, ScaleRecord, came_true

SECONDS = st.floats(0.01, 1000.0)


def after(ratios: list[float], prior_s: float = 2.0) -> Correction:
    return reduce(lambda known, r: known.after(prior_s=prior_s, actual_s=r * prior_s), ratios, Correction())


def test_the_prior_counts_as_one_observation() -> None:
    """Twice as long as stated: the next is expected to take the square root of two times as long."""
    assert after([2.0]).factor == pytest.approx(math.sqrt(2))
    assert after([2.0, 0.5]).factor == pytest.approx(2 ** ((0.5 * 2 / 3) - 1 / 3), abs=1e-9)


@given(st.floats(1 / RATIO_MAX, RATIO_MAX), st.floats(0.1, 1000.0))
def test_a_constant_error_is_learned(ratio: float, prior_s: float) -> None:
    assert after([ratio] * 30, prior_s).factor == pytest.approx(ratio, rel=0.01)


@given(st.lists(st.floats(1e-6, 1e6), max_size=30))
def test_a_factor_is_within_what_was_seen(ratios: list[float]) -> None:
    seen = [min(max(r, 1 / RATIO_MAX), RATIO_MAX) for r in ratios]
    assert min([1.0, *seen]) * (1 - 1e-9) <= after(ratios).factor <= max([1.0, *seen]) * (1 + 1e-9)


@given(st.lists(st.floats(0.5, 2.0), min_size=10, max_size=30))
def test_one_absurd_load_is_no_new_rule(ratios: list[float]) -> None:
    known = after(ratios)
    assert known.after(prior_s=1.0, actual_s=1e9).factor <= known.factor * RATIO_MAX**0.3 * 2**0.3


@given(SECONDS, SECONDS)
def test_only_what_ended_teaches_and_only_its_kind(prior_s: float, actual_s: float) -> None:
    opened = predict({}, What.TRANSFER, "disk", prior_s=prior_s, at=100.0)
    assert opened.predicted_s == opened.prior_s
    assert learned({}, opened) == {}
    known = learned({}, opened.ended(100.0 + actual_s))
    assert factor_of(known, What.TRANSFER, "device") == factor_of(known, What.LOAD, "disk") == 1.0
    closer = predict(known, What.TRANSFER, "disk", prior_s=prior_s, at=0.0).predicted_s
    assert min(prior_s, actual_s) - 0.01 <= closer <= max(prior_s, actual_s) + 0.01


def test_what_ended_stays_as_it_was() -> None:
    prediction = predict({}, What.LOAD, "disk", prior_s=1.0, at=10.0)
    assert prediction.ended(None) is prediction
    assert prediction.ended(12.5).ended(99.0).actual_s == 2.5
    assert prediction.ended(9.0).actual_s == pytest.approx(0.001)  # the clocks of two machines


def grown(worlds: Any) -> Any:
    """A scale-up from one to three, from start to end."""
    pilot = worlds.Pilot(worlds.World(), worlds.service(scaling=worlds.scaling(1, 3)))
    pilot.world.demand["m"] = worlds.demand()
    pilot.run(6)
    pilot.world.demand["m"] = worlds.demand(1500, 6, 6)
    pilot.run(1)
    return pilot


def test_a_scale_up_tells_what_it_expects_and_then_what_it_took(worlds: Any) -> None:
    pilot = grown(worlds)
    first, second = pilot.memories["m"].scales[-1].replicas
    assert [p.what for p in first.predictions] == list(What)
    assert all(p.actual_s is None for p in (*first.predictions, *second.predictions))
    estimates = pilot.memories["m"].estimates
    assert {way for _, way in estimates} == {"disk"}, "the first replica came from a disk"
    pilot.run(10)
    record = pilot.memories["m"].scales[-1]
    for replica in record.replicas:
        ended = {p.what: p for p in replica.predictions}
        assert ended[What.LOAD].actual_s == pytest.approx(replica.complete_at - ended[What.LOAD].begun_at)
        assert ended[What.TRANSFER].actual_s is not None and ended[What.TRANSFER].way == "device"
    assert (What.TRANSFER, "device") in pilot.memories["m"].estimates


def test_estimates_get_better_with_every_load(worlds: Any) -> None:
    """The world starts devices at once, so the stated half second is wrong; it is unlearned."""
    pilot = worlds.Pilot(worlds.World(nodes=1), worlds.service())
    errors = []
    for _ in range(5):
        pilot.run(8)
        load = next(p for p in pilot.memories["m"].scales[-1].replicas[-1].predictions if p.what is What.LOAD)
        errors.append(abs(math.log(load.predicted_s / load.actual_s)))
        pilot.world.nodes["node-0"].replicas.clear()
    assert errors[-1] < errors[0] / 3


PREDICTION = Prediction(
    what=What.LOAD, way="host memory", begun_at=1000.25, prior_s=1.5, predicted_s=2.125, actual_s=2.5
)


def record(*predictions: Prediction) -> ScaleRecord:
    replica = ScaledReplica(replica_id="m-1", node="n", predictions=predictions)
    return ScaleRecord(
        decided_at=1000.0,
        replicas_from=1,
        replicas_to=2,
        reason="r",
        rule="queue",
        policy="live",
        replicas=(replica,),
    )


def test_a_prediction_survives_a_restart() -> None:
    still = replace(PREDICTION, what=What.TRANSFER, actual_s=None)
    told = json.loads(json.dumps({"scales": [scale_json(record(PREDICTION, still))]}))
    assert memory_of(told).scales == (record(PREDICTION, still),)


def test_each_end_is_counted_once() -> None:
    still = replace(PREDICTION, actual_s=None)
    assert came_true([record(still)], [record(PREDICTION)]) == (PREDICTION,)
    assert came_true([record(PREDICTION)], [record(PREDICTION)]) == ()
    metrics = Metrics()
    metrics.show_prediction("m", PREDICTION)
    metrics.show_prediction("m", still)
    labels = {"model": "m", "what": "load"}
    told = metrics.registry.get_sample_value
    assert told("layercast_operator_predicted_seconds_sum", labels) == 2.125
    assert told("layercast_operator_actual_seconds_sum", labels) == 2.5
    assert told("layercast_operator_actual_seconds_count", labels) == 1
    metrics.forget_model("m")
    assert told("layercast_operator_actual_seconds_count", labels) is None


def test_schema_value_and_words_name_the_same_things() -> None:
    schema: Any = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    field = schema["properties"]["lastScale"]["properties"]["replicas"]["items"]["properties"]["predictions"]
    told = scale_json(record(PREDICTION))["replicas"][0]["predictions"][0]
    assert set(field["items"]["properties"]) == set(told)
    assert len(told) == len(dataclasses.fields(Prediction))
    assert all(what.value in field["items"]["properties"]["what"]["description"] for what in What)


def test_the_start_of_a_device_is_part_of_a_load(worlds: Any) -> None:
    pilot = grown(worlds)
    first = pilot.memories["m"].scales[-1].replicas[0]
    load = next(p for p in first.predictions if p.what is What.LOAD)
    segment = next(p for p in first.predictions if p.what is What.FIRST_SEGMENT)
    assert START_S < segment.prior_s < load.prior_s
