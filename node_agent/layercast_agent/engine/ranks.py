"""Tensor parallelism: one replica over several devices of a node, each with its share of every segment.

Which share is `tensor_parallel`'s; how the shares make one model is Megatron-LM's (arXiv 1909.08053, section 3): an
all-reduce after attention, one after the MLP, one after the embedding, and a gather of the logits.

One rank leads: it has the engine with its queue and its decisions, a `Leader` for a model and a `RankKV` for a cache.
Whatever the engine does with these, the leader first tells the others, who `follow`: the same calls, on their shares,
with the leader's hidden states. So scheduling, sampling and handoffs know nothing of ranks. Commands go by gloo;
tensors by NCCL between GPUs, by gloo between CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from enum import IntEnum

import torch
from torch import distributed

from layercast_agent.engine.architectures import ModelShape
from layercast_agent.engine.attention import BatchPlan, Span
from layercast_agent.engine.kv import KVCache
from layercast_agent.engine.model import LayeredModel
from layercast_agent.tensor_parallel import Split, span_of

IDLE_MAX = timedelta(days=365)
"""A follower waits for the next command as long as its leader lives; when that dies the connection breaks."""

COLLECTIVE_MAX = timedelta(seconds=60)
"""Longest time between two ranks' arrival at the same collective; beyond it the replica fails."""


class Command(IntEnum):
    """What a leader tells its followers."""

    END = 0
    EMBED = 1
    RUN = 2
    LOGITS = 3
    EXPORT = 4
    IMPORT = 5


class Ranks:
    """One rank's ties to the others. All of them call the same methods in the same order."""

    def __init__(self, split: Split, device: torch.device, address: str) -> None:
        """Meets the others at `address`, "tcp://host:port" on rank 0's machine; one replica a process at a time."""
        self.split = split
        self.device = device
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(
            backend, init_method=address, rank=split.rank, world_size=split.ranks, timeout=COLLECTIVE_MAX
        )
        self._control = distributed.new_group(backend="gloo", timeout=IDLE_MAX)

    def leave(self) -> None:
        """Ends the ties."""
        distributed.destroy_process_group()

    def total(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, in place."""
        distributed.all_reduce(partial)
        return partial

    def side_by_side(self, part: torch.Tensor, size: int) -> torch.Tensor:
        """All ranks' columns [N, share of size] as [N, size]; shares as `span_of` deals them."""
        widths = [
            last - first for first, last in (self._span(size, rank) for rank in range(self.split.ranks))
        ]
        # Collectives want equal shapes, and shares may differ by one column.
        padded = torch.nn.functional.pad(part, (0, max(widths) - part.shape[1])).contiguous()
        parts = self._everyone(padded)
        return torch.cat([found[:, :width] for found, width in zip(parts, widths, strict=True)], dim=1)

    def heads(self, part: torch.Tensor) -> torch.Tensor:
        """All KV heads [..., heads, D] from every rank's own; where several ranks hold one, the first one's."""
        parts = self._everyone(part.contiguous())
        step = max(1, self.split.ranks // self.split.kv_heads)
        return torch.cat(parts[::step], dim=-2)

    def leaders(self, tensor: torch.Tensor) -> torch.Tensor:
        """The leader's tensor, in place."""
        distributed.broadcast(tensor, src=0)
        return tensor

    def tell(self, command: Command, numbers: Sequence[int] = ()) -> None:
        """A command to all followers."""
        distributed.broadcast(torch.tensor([command, len(numbers)]), src=0, group=self._control)
        if numbers:
            distributed.broadcast(torch.tensor(numbers), src=0, group=self._control)

    def hear(self) -> tuple[Command, list[int]]:
        """The leader's next command. RuntimeError when the leader is gone."""
        header = torch.zeros(2, dtype=torch.int64)
        distributed.broadcast(header, src=0, group=self._control)
        numbers = torch.zeros(int(header[1]), dtype=torch.int64)
        if len(numbers):
            distributed.broadcast(numbers, src=0, group=self._control)
        return Command(int(header[0])), numbers.tolist()

    def _everyone(self, part: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(part) for _ in range(self.split.ranks)]
        distributed.all_gather(parts, part)
        return parts

    def _span(self, size: int, rank: int) -> tuple[int, int]:
        return span_of(size, rank, self.split.ranks)


class RankKV(KVCache):
    """A rank's KV heads. What is exported and imported are all heads, so handoffs are those of one device."""

    def __init__(self, shape: ModelShape, pages: int, page_size: int = 16, *, ranks: Ranks) -> None:
        first, last = ranks.split.kv_heads_held
        super().__init__(replace(shape, kv_heads=last - first), pages, page_size, device=ranks.device)
        self.row_bytes = shape.kv_row_bytes
        self._ranks = ranks

    def export_rows(
        self, pages: Sequence[int], *, first: int, last: int, start: int, stop: int
    ) -> torch.Tensor:
        """As KVCache, on the leader."""
        self._ranks.tell(Command.EXPORT, [first, last, start, stop, *pages])
        return self.export_here(pages, first=first, last=last, start=start, stop=stop)

    def import_rows(self, pages: Sequence[int], data: torch.Tensor, *, first: int, start: int) -> None:
        """As KVCache, on the leader."""
        self._ranks.tell(Command.IMPORT, [first, start, *data.shape, *pages])
        self.import_here(pages, data.to(self.device).contiguous(), first=first, start=start)

    def export_here(
        self, pages: Sequence[int], *, first: int, last: int, start: int, stop: int
    ) -> torch.Tensor:
        """This rank's part in an export."""
        return self._ranks.heads(super().export_rows(pages, first=first, last=last, start=start, stop=stop))

    def import_here(self, pages: Sequence[int], data: torch.Tensor, *, first: int, start: int) -> None:
        """This rank's part in an import; `data` is overwritten with the leader's."""
        held = slice(*self._ranks.split.kv_heads_held)
        rows = self._ranks.leaders(data)[..., held, :].contiguous()
        super().import_rows(pages, rows, first=first, start=start)


class Leader:
    """The leader's `LayeredModel`: its own share, after the followers were told."""

    def __init__(self, model: LayeredModel, ranks: Ranks) -> None:
        self.shape = model.shape
        self.device = model.device
        self._model = model
        self._ranks = ranks

    @property
    def block(self) -> str:
        """As LayeredModel."""
        return f"{self._model.block}, {self._ranks.split.ranks} ranks"

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As LayeredModel; the shapes are those of this rank's parts."""
        return self._model.named_tensors()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """As LayeredModel, this rank's parts."""
        self._model.check(shapes)

    def attach(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """As LayeredModel, this rank's parts. The followers attach theirs themselves."""
        self._model.attach(tensors)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """As LayeredModel."""
        self._ranks.tell(Command.EMBED, token_ids.tolist())
        return self._model.embed(token_ids)

    def run_layers(self, first: int, last: int, hidden: torch.Tensor, batch: BatchPlan) -> torch.Tensor:
        """As LayeredModel."""
        spans = [
            number
            for span in batch.spans
            for number in (span.start, span.count, len(span.pages), *span.pages)
        ]
        self._ranks.tell(Command.RUN, [first, last, len(hidden), *spans])
        return self._model.run_layers(first, last, self._ranks.leaders(hidden.contiguous()), batch)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As LayeredModel."""
        self._ranks.tell(Command.LOGITS, [len(hidden)])
        return self._model.logits(self._ranks.leaders(hidden.contiguous()))

    def end(self) -> None:
        """Lets the followers go."""
        self._ranks.tell(Command.END)


@torch.inference_mode()
def follow(model: LayeredModel, kv: RankKV, ranks: Ranks) -> None:
    """Does what the leader says until it ends. RuntimeError when it is gone."""

    def hidden(rows: int) -> torch.Tensor:
        shape = model.shape
        return ranks.leaders(torch.empty((rows, shape.hidden_size), dtype=shape.dtype, device=model.device))

    while True:
        command, numbers = ranks.hear()
        match command:
            case Command.END:
                return
            case Command.EMBED:
                model.embed(torch.tensor(numbers).to(model.device))
            case Command.RUN:
                first, last, rows, *spans = numbers
                model.run_layers(first, last, hidden(rows), BatchPlan.of(kv, _spans(spans)))
            case Command.LOGITS:
                model.logits(hidden(numbers[0]))
            case Command.EXPORT:
                first, last, start, stop, *pages = numbers
                kv.export_here(pages, first=first, last=last, start=start, stop=stop)
            case Command.IMPORT:
                (first, start), size, pages = numbers[:2], numbers[2:7], numbers[7:]
                data = torch.empty(size, dtype=kv.dtype, device=kv.device)
                kv.import_here(pages, data, first=first, start=start)


def _spans(numbers: Sequence[int]) -> list[Span]:
    spans, at = [], 0
    while at < len(numbers):
        start, count, pages = numbers[at : at + 3]
        at += 3 + pages
        spans.append(Span(start=start, count=count, pages=numbers[at - pages : at]))
    return spans
