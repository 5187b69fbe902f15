"""Our histograms say what the library's say, and the alarm and the pieces wake whom they should."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from layercast_gateway.alarm import Alarm
from layercast_gateway.generation import Piece, Pieces
from layercast_gateway.tally import Tallies, Totals

BOUNDS = (0.5, 1.0, 2.5)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([0.0, 0.5, 0.75, 1.0, 2.5, 4.0]))))
def test_series_are_those_of_the_library(values: list[tuple[str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tallies = Tallies("x_seconds", "Help.", bounds=BOUNDS)
    totals = Totals("x_seen", "Help.")
    ours.register(tallies)
    ours.register(totals)
    histogram = Histogram("x_seconds", "Help.", ("model",), buckets=BOUNDS, registry=theirs)
    counter = Counter("x_seen", "Help.", ("model",), registry=theirs)
    for model, value in values:
        tallies.of(model).observe(value)
        histogram.labels(model).observe(value)
        totals.of(model).count += 2
        counter.labels(model).inc(2)
    lines = generate_latest(theirs).decode().splitlines()
    assert generate_latest(ours).decode().splitlines() == [line for line in lines if "_created" not in line]
    asked = ours.restricted_registry(["x_seconds_bucket"])
    assert (b"x_seconds_bucket" in generate_latest(asked)) == bool(values)


async def test_the_alarm_rings_at_the_earliest_time() -> None:
    loop, rung = asyncio.get_running_loop(), asyncio.Event()
    alarm = Alarm(rung.set)
    alarm.at_latest(loop.time() + 3600)
    alarm.at_latest(loop.time() + 0.01)
    alarm.at_latest(loop.time() + 1800)
    await asyncio.wait_for(rung.wait(), 60)
    rung.clear()
    alarm.at_latest(loop.time() + 0.01)  # it can be set again
    await asyncio.wait_for(rung.wait(), 60)
    alarm.at_latest(loop.time() + 0.01)
    alarm.close()


async def test_pieces_are_taken_together_and_bounded() -> None:
    pieces = Pieces(3)
    first = asyncio.create_task(pieces.take())
    await asyncio.sleep(0)
    pieces.put(Piece(index=0, text="a"))
    assert [piece.text for piece in await first] == ["a"]
    for text in "bcd":
        pieces.put(Piece(index=0, text=text))
    with pytest.raises(asyncio.QueueFull):
        pieces.put(Piece(index=0, text="e"))
    assert [piece.text for piece in await pieces.take()] == ["b", "c", "d"]


async def test_who_wants_whole_answers_is_woken_at_the_end() -> None:
    pieces = Pieces(4, wake_early=False)
    pieces.put(Piece(index=0, text="a"))
    taken = asyncio.create_task(pieces.take())
    await asyncio.sleep(0)
    pieces.put(Piece(index=1, text="b"))
    await asyncio.sleep(0)
    assert not taken.done()
    pieces.put(Piece(index=1, finish_reason="stop"))
    assert [piece.text for piece in await taken] == ["a", "b", ""]
    pieces.put(Piece(index=0, finish_reason="stop"))
    pieces.put(Piece(index=2, text="c"))
    assert len(await pieces.take()) == 2  # an end is news also when it is not the newest


async def test_one_who_stopped_waiting_is_not_woken() -> None:
    pieces = Pieces(2)
    waiting = asyncio.create_task(pieces.take())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    pieces.put(Piece(index=0, text="a"))
    assert [piece.text for piece in await pieces.take()] == ["a"]


async def test_what_comes_faster_than_the_pace_is_taken_together() -> None:
    now = 100.0
    pieces = Pieces(9, pace_s=60.0, clock=lambda: now)
    pieces.put(Piece(index=0, text="a"))
    async with asyncio.timeout(10):
        assert [piece.text for piece in await pieces.take()] == ["a"], "nobody waits for the first"
        now += 59.95
        pieces.put(Piece(index=0, text="b"))
        taken = asyncio.create_task(pieces.take())
        await asyncio.sleep(0)
        assert not taken.done()
        pieces.put(Piece(index=0, text="c"))
        assert [piece.text for piece in await taken] == ["b", "c"]
        now += 60.0
        pieces.put(Piece(index=0, text="d"))
        assert [piece.text for piece in await pieces.take()] == ["d"], "who comes slowly does not wait"
