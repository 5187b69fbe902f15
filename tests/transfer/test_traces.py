"""Golden traces: what the transfer machine says to a given course of events, as text that a reviewer reads.

Each file in traces/ holds commands and, under `----`, the instructions that they caused. After a wanted change
of behaviour run `LAYERCAST_REWRITE=1 pytest tests/transfer/test_traces.py` and commit the difference only if
you understand it.

Commands (time stands still but for `after`):
    new chunks=2,3 window=2 upstreams=A,B [order=1,0] [held=0/1,...]     first line of a file
    connected LINK                    announce LINK all|none|0/0,0/1,...
    arrived LINK CHUNK                corrupt LINK CHUNK           refused LINK CHUNK
    bytes LINK                        ended LINK REASON...         replace GENERATION A,B
    cancel                            fault REASON...              after SECONDS (in ticks of 0.1 s)
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layercast_agent import transfer_events as ev
from layercast_agent.transfer import Transfer
from layercast_agent.transfer_events import Chunk, TransferLimits, UpstreamSpec

TRACES = Path(__file__).parent / "traces"


def _chunk(text: str) -> Chunk:
    segment, chunk = text.split("/")
    return Chunk(segment=int(segment), chunk=int(chunk))


def _specs(text: str) -> tuple[UpstreamSpec, ...]:
    return tuple(UpstreamSpec(peer_id=name) for name in text.split(",") if name)


def _say(instruction: ev.Instruction) -> str:
    match instruction:
        case ev.OpenUpstream():
            return f"open {instruction.upstream.peer_id} as link {instruction.link}"
        case ev.CloseUpstream():
            return f"close link {instruction.link}: {instruction.reason}"
        case ev.FetchChunk():
            return f"fetch {instruction.chunk} from link {instruction.link}"
        case ev.ChunkVerified():
            return f"verified {instruction.chunk}"
        case ev.SegmentComplete():
            return f"segment {instruction.segment} complete"
        case ev.UpstreamFailed():
            return f"{instruction.upstream.peer_id} failed: {instruction.reason}"
        case ev.TransferStalled() | ev.TransferFailed():
            return f"{type(instruction).__name__}: {instruction.reason}"
        case _:
            return type(instruction).__name__


class Trace:
    """Runs commands against one machine."""

    def __init__(self) -> None:
        self.now = 0.0
        self.counts: list[int] = []
        self.machine: Transfer | None = None

    def run(self, command: str) -> list[str]:
        verb, *words = command.split()
        if verb == "new":
            return self._new(dict(word.split("=") for word in words))
        if verb == "after":
            end = self.now + float(words[0])
            said: list[str] = []
            while self.now < end - 1e-9:
                self.now = round(self.now + 0.1, 3)
                said += [f"{self.now:g}s {line}" for line in self._receive(ev.Ticked())]
            return said
        return self._receive(self._event(verb, words))

    def _new(self, options: dict[str, str]) -> list[str]:
        self.counts = [int(n) for n in options["chunks"].split(",")]
        self.machine = Transfer(
            chunk_counts=self.counts,
            segment_order=[int(n) for n in options.get("order", "").split(",") if n],
            held=self._bitmaps(options.get("held", "none")),
            upstreams=_specs(options["upstreams"]),
            generation=1,
            now=self.now,
            limits=TransferLimits(window_chunks=int(options["window"])),
        )
        return self._receive(ev.Ticked())

    def _bitmaps(self, text: str) -> dict[int, bytes]:
        every = [f"{s}/{c}" for s, count in enumerate(self.counts) for c in range(count)]
        named = {"all": every, "none": []}.get(text, text.split(","))
        bits = dict.fromkeys(range(len(self.counts)), 0)
        for chunk in map(_chunk, named):
            bits[chunk.segment] |= 1 << chunk.chunk
        return {segment: value.to_bytes(4, "little") for segment, value in bits.items()}

    def _event(self, verb: str, words: list[str]) -> ev.Event:
        match verb:
            case "connected":
                return ev.UpstreamConnected(link=int(words[0]))
            case "announce":
                return ev.ChunksAnnounced(link=int(words[0]), segments=self._bitmaps(words[1]))
            case "arrived":
                return ev.ChunkArrived(link=int(words[0]), chunk=_chunk(words[1]))
            case "corrupt":
                return ev.ChunkCorrupt(link=int(words[0]), chunk=_chunk(words[1]))
            case "refused":
                return ev.FetchRefused(link=int(words[0]), chunk=_chunk(words[1]), reason="fenced")
            case "bytes":
                return ev.BytesReceived(link=int(words[0]))
            case "ended":
                return ev.UpstreamEnded(link=int(words[0]), reason=" ".join(words[1:]))
            case "replace":
                return ev.UpstreamsReplaced(generation=int(words[0]), upstreams=_specs(words[1]))
            case "cancel":
                return ev.TransferCancelled()
            case "fault":
                return ev.LocalFault(reason=" ".join(words))
        raise ValueError(f"unknown command {verb}")

    def _receive(self, event: ev.Event) -> list[str]:
        assert self.machine is not None
        return [_say(instruction) for instruction in self.machine.receive(event, self.now)]


def _rewritten(text: str) -> str:
    """The trace with every output replaced by what the machine says now. Comments and order are kept."""
    trace = Trace()
    blocks: list[str] = []
    for block in text.strip().split("\n\n"):
        commands = block.partition("----")[0].strip().splitlines()
        said: list[str] = []
        for command in commands:
            if not command.startswith("#"):
                said += trace.run(command)
        if all(command.startswith("#") for command in commands):
            blocks.append("\n".join(commands))
        else:
            blocks.append("\n".join([*commands, "----", *said]))
    return "\n\n".join(blocks) + "\n"


@pytest.mark.parametrize("path", sorted(TRACES.glob("*.txt")), ids=lambda path: path.stem)
def test_trace(path: Path) -> None:
    text = path.read_text()
    now = _rewritten(text)
    if os.environ.get("LAYERCAST_REWRITE"):
        path.write_text(now)
    else:
        assert now == text, "behaviour changed; see the module's docstring"


def test_there_are_traces() -> None:
    assert len(list(TRACES.glob("*.txt"))) >= 8
