"""When requests come and how long they are. Pure: a seed and a shape in, a list of arrivals out.

Rates are multiples of one replica's measured capacity, so that the same shape means the same pressure on any
machine. A public trace keeps its temporal pattern: its window is stretched to the run's length and thinned or
repeated to the wanted mean rate, as the papers do (BlitzScale, section 6, after TraceUpscaler).
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request: seconds after the start, tokens in, tokens out."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """What this machine can serve: tokens of a prompt and of an answer."""

    prompt_tokens: int
    prompt_tokens_min: int
    prompt_tokens_max: int
    output_tokens: int
    output_tokens_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Arrivals, how long the whole run is, and since when it is more than one replica can serve."""

    arrivals: tuple[Arrival, ...]
    seconds: float
    overload_at_s: float | None = None


def step(
    *, capacity: float, low: float, high: float, low_s: float, high_s: float, lengths: Lengths, seed: int
) -> Shape:
    """`low` x capacity for `low_s`, then at once `high` x capacity for `high_s`; equal lengths.

    Arrivals are even with a jitter of half a gap: with a Poisson process two replicas at nine tenths of their
    capacity queue by themselves, and the tail tells of that chance instead of the scale-up.
    """
    chance = random.Random(seed)
    arrivals, at = [], 0.0
    while at < low_s + high_s:
        gap = 1 / (capacity * (low if at < low_s else high))
        at += gap
        arrivals.append(
            Arrival(
                at_s=max(0.0, at + chance.uniform(-gap / 2, gap / 2)),
                prompt_tokens=lengths.prompt_tokens,
                output_tokens=lengths.output_tokens,
            )
        )
    return Shape(
        arrivals=tuple(sorted(arrivals, key=lambda each: each.at_s)),
        seconds=low_s + high_s,
        overload_at_s=low_s,
    )


def burst(*, capacity: float, mean: float, seconds: float, lengths: Lengths, seed: int) -> Shape:
    """Isolated bursts of three times the mean over a low floor, as in BurstGPT's windows.

    Three bursts of a tenth of the run each; the floor makes up the rest of the mean.
    """
    width, height = seconds / 10, 3 * mean
    starts = [seconds * share for share in (0.15, 0.45, 0.75)]
    floor = max(0.0, (mean * seconds - 3 * width * height) / (seconds - 3 * width))

    def rate(at: float) -> float:
        inside = any(start <= at < start + width for start in starts)
        return capacity * (height if inside else floor)

    arrivals = _poisson(
        rate, peak=capacity * max(height, floor), seconds=seconds, draw=_spread(lengths), seed=seed
    )
    return Shape(arrivals=arrivals, seconds=seconds, overload_at_s=starts[0])


def azure_like(*, capacity: float, mean: float, seconds: float, lengths: Lengths, seed: int) -> Shape:
    """A slow wave with short spikes and heavy-tailed lengths, as in the code trace of Azure's 2023 data set."""
    spikes = [seconds * share for share in (0.1, 0.3, 0.62, 0.86)]
    wave_height = 0.35

    def rate(at: float) -> float:
        wave = 1 + wave_height * math.sin(2 * math.pi * at / seconds - math.pi / 2)
        spike = 2.0 if any(start <= at < start + seconds / 25 for start in spikes) else 0.0
        return capacity * mean * (wave + spike) / 1.32  # the spikes add 8 parts in 25 of the mean

    arrivals = _poisson(rate, peak=capacity * mean * 3.4, seconds=seconds, draw=_spread(lengths), seed=seed)
    return Shape(arrivals=arrivals, seconds=seconds, overload_at_s=spikes[0])


def from_csv(
    path: Path, *, capacity: float, mean: float, seconds: float, lengths: Lengths, seed: int
) -> Shape:
    """The first hour of a trace in Azure's format (TIMESTAMP, ContextTokens, GeneratedTokens), made to fit.

    Time is squeezed to `seconds`, requests are drawn with equal chance until the mean rate is `mean` x capacity,
    lengths are scaled so that their medians are the machine's, and clipped. Raises ValueError for a file that is
    not in that format.
    """
    rows = read_trace(path)
    chance = random.Random(seed)
    first, last = rows[0].at_s, rows[-1].at_s
    squeeze = seconds / max(last - first, 1e-9)
    wanted = max(1, round(capacity * mean * seconds))
    drawn = chance.choices(rows, k=wanted) if wanted > len(rows) else chance.sample(rows, wanted)
    prompt_scale = lengths.prompt_tokens / _median([row.prompt_tokens for row in rows])
    output_scale = lengths.output_tokens / _median([row.output_tokens for row in rows])
    jitter = seconds / len(rows)
    arrivals = [
        Arrival(
            at_s=min(seconds, (row.at_s - first) * squeeze + chance.uniform(0, jitter)),
            prompt_tokens=_clip(
                row.prompt_tokens * prompt_scale, lengths.prompt_tokens_min, lengths.prompt_tokens_max
            ),
            output_tokens=_clip(row.output_tokens * output_scale, 1, lengths.output_tokens_max),
        )
        for row in drawn
    ]
    return Shape(arrivals=tuple(sorted(arrivals, key=lambda each: each.at_s)), seconds=seconds)


def read_trace(path: Path) -> list[Arrival]:
    """The rows of a trace file, in order of time. Raises ValueError naming the line that is wrong."""
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            try:
                at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
                rows.append(
                    Arrival(
                        at_s=at,
                        prompt_tokens=int(row["ContextTokens"]),
                        output_tokens=int(row["GeneratedTokens"]),
                    )
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {line}: not TIMESTAMP,ContextTokens,GeneratedTokens: {error}"
                ) from error
    if not rows:
        raise ValueError(f"{path} has no requests")
    return sorted(rows, key=lambda each: each.at_s)


def _poisson(
    rate: Callable[[float], float],
    *,
    peak: float,
    seconds: float,
    draw: Callable[[random.Random], tuple[int, int]],
    seed: int,
) -> tuple[Arrival, ...]:
    """A Poisson process with a rate that changes (thinning, Lewis and Shedler 1979)."""
    chance = random.Random(seed)
    arrivals: list[Arrival] = []
    at = 0.0
    while True:
        at += chance.expovariate(peak)
        if at >= seconds:
            return tuple(arrivals)
        if chance.random() < rate(at) / peak:
            prompt_tokens, output_tokens = draw(chance)
            arrivals.append(Arrival(at_s=at, prompt_tokens=prompt_tokens, output_tokens=output_tokens))


def _spread(lengths: Lengths) -> Callable[[random.Random], tuple[int, int]]:
    """Log-normal lengths around the medians, clipped."""

    def draw(chance: random.Random) -> tuple[int, int]:
        return (
            _clip(
                chance.lognormvariate(math.log(lengths.prompt_tokens), 0.6),
                lengths.prompt_tokens_min,
                lengths.prompt_tokens_max,
            ),
            _clip(chance.lognormvariate(math.log(lengths.output_tokens), 0.5), 1, lengths.output_tokens_max),
        )

    return draw


def _clip(value: float, low: int, high: int) -> int:
    return max(low, min(high, round(value)))


def _median(values: Sequence[int]) -> float:
    return max(1.0, sorted(values)[len(values) // 2])
