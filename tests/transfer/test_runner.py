"""One transfer with its threads, from holders in this process over loopback, and from this node's disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from layercast_agent.errors import NoCapacityError
from layercast_agent.regions import HostMemory
from layercast_agent.residency import Residency
from layercast_agent.runner import TransferLimits, TransferOutcome, TransferRunner, UpstreamSpec
from layercast_agent.store import Store

TOKEN = b"a token that both ends know"
KIB = 1024
SIZES = [300 * KIB, 260 * KIB + 7, 260 * KIB, 129 * KIB + 1]
CHUNK = 64 * KIB
LIMITS = TransferLimits(backoff_s=0.05, stall_s=0.3)


class Target:
    """A transfer and what it told."""

    def __init__(self, checkpoint: Any, upstreams: list[UpstreamSpec], **options: Any) -> None:
        self.checkpoint = checkpoint
        self.memories: list[Any] = options.pop("memories", None) or checkpoint.empty_memories()
        self.residency = options.pop("residency", None) or Residency(checkpoint.manifest)
        self.segments: list[int] = []
        self.outcomes: list[TransferOutcome] = []
        self.over = threading.Event()
        self.first_segment = threading.Event()
        arguments: dict[str, Any] = {
            "transfer_id": "t",
            "generation": 1,
            "segment_order": (),
            "token": TOKEN,
            "on_segment": self._on_segment,
            "limits": LIMITS,
            **options,
        }
        self.runner = TransferRunner(
            manifest=checkpoint.manifest,
            memories=self.memories,
            residency=self.residency,
            upstreams=upstreams,
            on_end=self._on_end,
            **arguments,
        )
        self.runner.start()

    def _on_segment(self, segment: int) -> None:
        assert self.residency.segment_complete(segment)
        self.segments.append(segment)
        self.first_segment.set()

    def _on_end(self, outcome: TransferOutcome) -> None:
        self.outcomes.append(outcome)
        self.over.set()

    def wait_complete(self) -> None:
        assert self.over.wait(20), self.runner.status()
        assert self.outcomes == [TransferOutcome(transfer_id="t", complete=True, reason="")]
        assert self.checkpoint.held_by(self.memories)
        assert self.residency.complete


@pytest.fixture
def target() -> Iterator[Callable[..., Target]]:
    """Starts targets and cancels them after the test."""
    started: list[Target] = []

    def start(*arguments: Any, **options: Any) -> Target:
        started.append(Target(*arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.runner.cancel(10)
    assert not [t.name for t in threading.enumerate() if t.name in ("transfer", "upstream", "disk")]


Holders = Callable[..., Any]
Targets = Callable[..., Target]


@pytest.fixture
def checkpoint(synthetic: ModuleType) -> Any:
    return synthetic.make(SIZES, chunk_bytes=CHUNK)


def wait_stalled(target: Target) -> str:
    changed = threading.Event()
    for _ in range(200):
        status = target.runner.status()
        if status.stalled:
            return status.stall_reason
        changed.wait(0.05)
    raise AssertionError(f"never stalled: {target.runner.status()}")


def test_everything_arrives_in_the_wanted_order(checkpoint: Any, holder: Holders, target: Targets) -> None:
    """One chunk in flight: with more, the two streams answer in any order between them."""
    one_at_a_time = TransferLimits(window_chunks=1)
    source = holder(checkpoint).spec()
    loading = target(checkpoint, [source], segment_order=[1, 2, 0, 3], limits=one_at_a_time)
    loading.wait_complete()
    assert loading.segments == [1, 2, 0, 3]
    status = loading.runner.status()
    assert status.complete and not status.stalled and status.failures == ()
    assert status.done_bytes == status.total_bytes == checkpoint.manifest.nbytes
    assert status.bytes_per_s > 0


def test_a_target_feeds_the_next_one_while_it_loads(
    checkpoint: Any, holder: Holders, target: Targets
) -> None:
    """The middle of the chain is a holder that is filled by a transfer of its own."""
    source = holder(checkpoint, egress_bytes_per_s=2_000_000)
    middle = holder(checkpoint, complete=False)
    last = target(checkpoint, [middle.spec("B"), source.spec("A")], limits=TransferLimits(stall_s=5))
    first = target(checkpoint, [source.spec("A")], memories=middle.memories, residency=middle.residency)
    last.first_segment.wait(20)
    assert not first.over.is_set(), "the last one began only after the middle one had ended"
    first.wait_complete()
    last.wait_complete()
    assert last.runner.status().failures == ()


def test_what_is_held_already_is_not_fetched_again(checkpoint: Any, holder: Holders, target: Targets) -> None:
    memories, residency = checkpoint.memories(), Residency(checkpoint.manifest)
    for chunk in range(checkpoint.manifest.chunk_count(0)):
        residency.mark(0, chunk)
    residency.mark(1, 0)
    source = holder(checkpoint)
    source.memories[0].staging(0, 100)[:] = bytes(100)  # would be refused if anybody asked for it
    loading = target(checkpoint, [source.spec()], memories=memories, residency=residency)
    loading.wait_complete()
    assert sorted(loading.segments) == [1, 2, 3]
    assert loading.runner.status().failures == ()


def test_a_complete_one_ends_at_once(checkpoint: Any, target: Targets) -> None:
    loading = target(
        checkpoint,
        [],
        memories=checkpoint.memories(),
        residency=Residency(checkpoint.manifest, complete=True),
    )
    loading.wait_complete()
    assert loading.segments == []


def test_the_next_upstream_continues_where_one_dies(
    checkpoint: Any, holder: Holders, target: Targets
) -> None:
    dying = holder(checkpoint, egress_bytes_per_s=1_000_000)
    loading = target(checkpoint, [dying.spec("B"), holder(checkpoint).spec("A")])
    assert loading.first_segment.wait(20)
    dying.data.close()
    loading.wait_complete()
    assert sorted(loading.segments) == [0, 1, 2, 3] and len(loading.segments) == 4
    assert loading.runner.status().failures[0].startswith("B: ")


def test_an_upstream_that_releases_its_copy_is_left(
    checkpoint: Any, holder: Holders, target: Targets
) -> None:
    leaving = holder(checkpoint, egress_bytes_per_s=1_000_000)
    loading = target(checkpoint, [leaving.spec("B"), holder(checkpoint).spec("A")])
    assert loading.first_segment.wait(20)
    leaving.holdings.remove(checkpoint.manifest.digest)
    loading.wait_complete()
    assert loading.runner.status().failures[0].startswith("B: ABORTED")


def test_corrupt_chunks_are_refused_and_come_from_elsewhere(
    checkpoint: Any, holder: Holders, target: Targets
) -> None:
    rotten = holder(checkpoint)
    rotten.memories[2].staging(70 * KIB, 1)[0] ^= 1
    loading = target(checkpoint, [rotten.spec("B"), holder(checkpoint).spec("A")])
    loading.wait_complete()
    assert loading.runner.status().failures == ("B: 2 corrupt chunks, the last was 2/1",)


def test_strangers_and_other_checkpoints_are_refused_until_the_list_is_better(
    checkpoint: Any, synthetic: ModuleType, holder: Holders, target: Targets
) -> None:
    good, other = holder(checkpoint), holder(synthetic.make(SIZES, chunk_bytes=CHUNK, seed=1))
    nobody = UpstreamSpec(peer_id="N", address="127.0.0.1:1", data_address="127.0.0.1:1")
    swapped = UpstreamSpec(peer_id="S", address=good.spec().address, data_address="nonsense")
    loading = target(checkpoint, [other.spec("O"), nobody, swapped])
    reason = wait_stalled(loading)
    # The peer's two addresses are tried side by side: one or the other is the first to refuse.
    assert "O: NOT_FOUND" in reason and "127.0.0.1:1" in reason and "refused" in reason.lower()
    assert "S: 'nonsense' is not a data address" in reason
    loading.runner.replace_upstreams([good.spec("A")], generation=1)  # not newer: nothing changes
    assert loading.runner.status().stalled
    loading.runner.replace_upstreams([good.spec("A")], generation=2)
    loading.wait_complete()
    assert loading.runner.status().generation == 2


def test_a_wrong_token_is_said(checkpoint: Any, holder: Holders, target: Targets) -> None:
    loading = target(checkpoint, [holder(checkpoint).spec()], token=b"wrong")
    assert "A: the peer refused the token" in wait_stalled(loading)


def test_after_cancel_memory_is_quiet(checkpoint: Any, holder: Holders, target: Targets) -> None:
    source = holder(checkpoint, egress_bytes_per_s=500_000)
    loading = target(checkpoint, [source.spec()])
    assert loading.first_segment.wait(20)
    loading.runner.cancel(10)
    assert loading.outcomes == [TransferOutcome(transfer_id="t", complete=False, reason="cancelled")]
    assert not [t.name for t in threading.enumerate() if t.name in ("transfer", "upstream")]
    assert not loading.residency.complete
    loading.runner.cancel(10)  # once more is harmless


class BrokenMemory(HostMemory):
    """A device that fails when bytes are committed."""

    def commit(self, offset: int, nbytes: int, staged: memoryview) -> None:
        raise RuntimeError("device lost")


def test_faults_of_this_side_end_the_transfer(checkpoint: Any, holder: Holders, target: Targets) -> None:
    source = holder(checkpoint)
    memories = [BrokenMemory(len(segment)) for segment in checkpoint.data]
    loading = target(checkpoint, [source.spec()], memories=memories)
    assert loading.over.wait(20)
    assert loading.outcomes[0].reason == "RuntimeError: device lost"

    def refuse(segment: int) -> None:
        raise ValueError(f"no use for {segment}")

    loading = target(checkpoint, [source.spec()], on_segment=refuse)
    assert loading.over.wait(20)
    assert [outcome.reason for outcome in loading.outcomes] == ["ValueError: no use for 0"]


class SlowMemory(HostMemory):
    """A device whose copies wait for a test."""

    may_go = threading.Event()

    def commit(self, offset: int, nbytes: int, staged: memoryview) -> None:
        assert self.may_go.wait(20)


def test_cancel_says_when_memory_is_not_quiet_yet(checkpoint: Any, holder: Holders, target: Targets) -> None:
    SlowMemory.may_go.clear()
    memories = [SlowMemory(len(segment)) for segment in checkpoint.data]
    loading = target(checkpoint, [holder(checkpoint).spec()], memories=memories)
    changed = threading.Event()
    for _ in range(400):
        if any(bytes(m.view(0, 100)) != bytes(100) for m in memories):
            break
        changed.wait(0.02)
    with pytest.raises(NoCapacityError, match="has not stopped"):
        loading.runner.cancel(0.1)
    SlowMemory.may_go.set()
    loading.runner.cancel(10)
    assert loading.outcomes[0].reason == "cancelled"


def test_sizes_and_orders_that_do_not_fit_are_refused_before_anything_starts(checkpoint: Any) -> None:
    with pytest.raises(ValueError, match="memories do not have the sizes"):
        Target(checkpoint, [], memories=[HostMemory(1)] * 4)
    with pytest.raises(ValueError, match="segment order"):
        Target(checkpoint, [], segment_order=[0, 4])
    with pytest.raises(ValueError, match="segment order"):
        Target(checkpoint, [], segment_order=[0, 0])


@pytest.fixture
def packed(tinymodels: ModuleType, tmp_path: Path) -> Path:
    """The folder of a packed tiny model."""
    source = tinymodels.make(tmp_path / "source", "llama", layers=2)
    store = Store(tmp_path / "store", chunk_bytes=4096)
    manifest = store.prepare(
        key="k", source=f"file://{source}", revision="", dtype="", progress=lambda progress: None
    )
    return store.folder(manifest.digest)


def on_disk(folder: Path, synthetic: ModuleType) -> Any:
    from layercast_agent.checkpoint_files import PackedCheckpoint

    files = PackedCheckpoint(folder)
    data = tuple(bytes(files.view(s.index, 0, s.nbytes)) for s in files.manifest.segments)
    files.close()
    return synthetic.Checkpoint(manifest=files.manifest, data=data)


def test_this_nodes_disk_is_an_upstream(packed: Path, synthetic: ModuleType, target: Targets) -> None:
    checkpoint = on_disk(packed, synthetic)
    loading = target(checkpoint, [UpstreamSpec(peer_id="disk", local_folder=packed)])
    loading.wait_complete()
    assert loading.runner.status().failures == ()


def test_rotten_and_wrong_folders_are_left_for_a_peer(
    packed: Path, synthetic: ModuleType, holder: Holders, target: Targets, tmp_path: Path
) -> None:
    checkpoint = on_disk(packed, synthetic)
    rotten = sorted(packed.glob("segment-*.safetensors"))[1]
    content = bytearray(rotten.read_bytes())
    content[-1] ^= 1
    rotten.write_bytes(content)
    upstreams = [
        UpstreamSpec(peer_id="none", local_folder=tmp_path / "nothing"),
        UpstreamSpec(peer_id="disk", local_folder=packed),
        holder(checkpoint).spec("A"),
    ]
    loading = target(checkpoint, upstreams)
    loading.wait_complete()
    failures = loading.runner.status().failures
    assert any(failure.startswith("none: cannot be read") for failure in failures)
    assert any(failure.startswith("disk: 2 corrupt chunks") for failure in failures)


def test_another_checkpoints_folder_is_refused(packed: Path, checkpoint: Any, target: Targets) -> None:
    loading = target(checkpoint, [UpstreamSpec(peer_id="disk", local_folder=packed)])
    assert "holds another checkpoint" in wait_stalled(loading)
