"""The scheduler's decisions as text: each golden file is a story whose every step was read and agreed with.

`LAYERCAST_UPDATE_GOLDEN=1` writes them anew. A line is a command; what the scheduler did follows, indented.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layercast_agent.engine.pages import PageAllocator
from layercast_agent.engine.scheduler import EngineLimits, Scheduler
from layercast_agent.engine.sequence import SamplingParams, Sequence

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.txt"))
LAYERS, PAGE = 2, 4


class Story:
    """Carries out the commands of a golden file."""

    def __init__(self) -> None:
        self.subject = self.begin()

    def begin(self, **values: int) -> Scheduler:
        limits = {"pages": 8, "batch": 4, "tokens": 12} | values
        return Scheduler(
            pages=PageAllocator(limits["pages"]),
            page_size=PAGE,
            layers=LAYERS,
            limits=EngineLimits(
                batch_size_max=limits["batch"],
                step_tokens_max=limits["tokens"],
                waiting_max=9,
                context_length_max=64,
            ),
        )

    def tell(self, command: str) -> list[str]:
        match command.split():
            case ["limits", *pairs]:
                self.subject = self.begin(
                    **{k: int(v) for k, _, v in (pair.partition("=") for pair in pairs)}
                )
                return []
            case ["add", name, prompt, output, arrived_at]:
                self.add(name, prompt, int(output), float(arrived_at))
                return []
            case ["cancel", name]:
                seq = self.subject.find(name)
                assert seq is not None
                self.subject.remove(seq)
                return []
            case ["step"]:
                return self.step()
            case _:
                raise AssertionError(f"{command!r} is no command")

    def add(self, name: str, prompt: str, output: int, arrived_at: float) -> None:
        self.subject.add(
            Sequence(
                request_id=name,
                attempt=1,
                gateway_id="g",
                prompt=tuple(map(ord, prompt)),
                generated=[],
                sampling=SamplingParams(max_tokens=output),
                arrived_at=arrived_at,
            )
        )

    def step(self) -> list[str]:
        preempted = self.subject.counts.preemptions
        works = self.subject.plan()
        told = [
            f"{work.seq.request_id} [{work.start}, {work.stop}) of {work.seq.prefix_length} in pages {work.seq.pages}"
            for work in works
        ]
        for work in works:
            self.subject.advance(work)
            if work.completes_prefix:
                work.seq.generated.append(0)
            if work.seq.finish(64) is not None:
                told.append(f"{work.seq.request_id} ends")
                self.subject.remove(work.seq)
        if (more := self.subject.counts.preemptions - preempted) > 0:
            told.append(f"{more} preempted")
        waiting = " ".join(seq.request_id for seq in self.subject.waiting)
        pages = self.subject.pages
        told.append(
            f"waiting: {waiting or '-'}; pages: {pages.used} used, {pages.cached} cached of {pages.total}"
        )
        return told


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_the_story_goes_as_agreed(file: Path) -> None:
    story = Story()
    told: list[str] = []
    agreed = file.read_text()
    for line in agreed.splitlines():
        if line.startswith("  "):
            continue
        told.append(line)
        if line and not line.startswith("#"):
            told += [f"  {entry}" for entry in story.tell(line)]
    text = "\n".join(told) + "\n"
    if os.environ.get("LAYERCAST_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == agreed


def test_there_are_stories() -> None:
    assert len(GOLDEN) >= 4
