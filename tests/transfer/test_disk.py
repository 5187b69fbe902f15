"""Loading from this node's own files: cold and warm, copied and mapped, sound and rotten."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from layercast_agent.checkpoint_files import PackedCheckpoint
from layercast_agent.device import DeviceMemory, slab_of
from layercast_agent.direct_io import PackedReader
from layercast_agent.errors import CheckpointError
from layercast_agent.host_memory import HUGE_BYTES, Reserve, allocate
from layercast_agent.packing import segment_file
from layercast_agent.page_cache import (
    VERIFIED_ATTRIBUTE,
    bring_in,
    cached_share,
    remember_verified,
    was_verified,
)
from layercast_agent.regions import HostMemory
from layercast_agent.residency import Residency
from layercast_agent.runner import TransferOutcome, TransferRunner, UpstreamSpec
from layercast_agent.store import Store
from layercast_agent.transport.disk import READERS

CPU = torch.device("cpu")
DEADLINE_S = 20.0


@pytest.fixture
def packed(tinymodels: ModuleType, tmp_path: Path) -> Path:
    """The folder of a packed tiny model, many chunks a segment."""
    source = tinymodels.make(tmp_path / "source", "llama", layers=2)
    store = Store(tmp_path / "store", chunk_bytes=4096)
    manifest = store.prepare(
        key="k", source=f"file://{source}", revision="", dtype="", progress=lambda progress: None
    )
    return store.folder(manifest.digest)


def load(folder: Path, memories: list[Any], upstreams: list[UpstreamSpec] | None = None) -> TransferOutcome:
    """One transfer from a folder to its end."""
    with_manifest = PackedCheckpoint(folder)
    manifest = with_manifest.manifest
    with_manifest.close()
    over = threading.Event()
    outcomes: list[TransferOutcome] = []

    def on_end(outcome: TransferOutcome) -> None:
        outcomes.append(outcome)
        over.set()

    runner = TransferRunner(
        transfer_id="t",
        manifest=manifest,
        memories=memories,
        residency=Residency(manifest),
        upstreams=upstreams or [UpstreamSpec(peer_id="disk", local_folder=folder)],
        generation=1,
        segment_order=(),
        token=b"",
        on_segment=lambda segment: None,
        on_end=on_end,
    )
    runner.start()
    assert over.wait(DEADLINE_S), runner.status()
    runner.cancel(DEADLINE_S)
    return outcomes[0]


def content(folder: Path) -> list[bytes]:
    files = PackedCheckpoint(folder)
    data = [bytes(files.view(s.index, 0, s.nbytes)) for s in files.manifest.segments]
    files.close()
    return data


def device_memories(folder: Path) -> list[DeviceMemory]:
    return [DeviceMemory(len(data), CPU) for data in content(folder)]


def share_of(files: PackedCheckpoint, segment: int, offset: int, nbytes: int) -> float:
    with files.path(segment).open("rb") as file, files.view(segment, offset, nbytes) as mapped:
        return cached_share(file.fileno(), files.data_start(segment) + offset, mapped)


def evict(folder: Path) -> None:
    """Asks the kernel to forget the files; skips where it does not, as a file system in memory."""
    for path in folder.glob("segment-*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    files = PackedCheckpoint(folder)
    share = share_of(files, 1, 0, files.manifest.segments[1].nbytes)
    files.close()
    if share > 0.5:
        pytest.skip("this file system keeps its pages in memory")


def is_mapped(memory: DeviceMemory) -> bool:
    return memory.view(0, 1).readonly


def forget(folder: Path) -> None:
    for path in folder.glob("segment-*"):
        os.removexattr(path, VERIFIED_ATTRIBUTE)


def test_a_warm_file_becomes_the_memory(packed: Path) -> None:
    memories = device_memories(packed)
    assert load(packed, memories).complete
    assert [bytes(m.view(0, m.nbytes)) for m in memories] == content(packed)
    assert all(is_mapped(memory) for memory in memories)
    assert bytes(memories[1].tensor[:64].numpy()) == content(packed)[1][:64]


def test_memory_that_cannot_be_exchanged_is_filled(packed: Path) -> None:
    memories = [HostMemory(len(data)) for data in content(packed)]
    assert load(packed, memories).complete
    assert [bytes(m.view(0, m.nbytes)) for m in memories] == content(packed)


def test_a_mapped_copy_outlives_the_files(packed: Path) -> None:
    """Garbage collection unlinks; nobody changes a file in place."""
    expected = content(packed)
    memories = device_memories(packed)
    load(packed, memories)
    tensors = [memory.tensor for memory in memories]
    for path in packed.glob("segment-*"):
        path.unlink()
    del memories
    assert [bytes(tensor.numpy()) for tensor in tensors] == expected


def test_cold_files_are_read_past_the_page_cache(packed: Path) -> None:
    expected = content(packed)
    memories = device_memories(packed)
    evict(packed)
    assert load(packed, memories).complete
    assert [bytes(m.view(0, m.nbytes)) for m in memories] == expected
    assert not any(is_mapped(memory) for memory in memories)
    files = PackedCheckpoint(packed)
    # The file's first page was mapped to compare its header, and its last ones do not fill a block.
    assert share_of(files, 1, 4096, files.manifest.segments[1].nbytes - 3 * 4096) == 0


def test_unaligned_memory_is_filled_all_the_same(packed: Path) -> None:
    class OddMemory(HostMemory):
        """Begins one byte behind a page."""

        def __init__(self, nbytes: int) -> None:
            super().__init__(nbytes)
            self._odd = allocate(nbytes + 1)[1:]

        def view(self, offset: int, nbytes: int) -> memoryview:
            return self._odd[offset : offset + nbytes]

    expected = content(packed)
    memories = [OddMemory(len(data)) for data in expected]
    evict(packed)
    assert load(packed, memories).complete
    assert [bytes(m.view(0, m.nbytes)) for m in memories] == expected


def test_a_load_that_fails_has_ended_when_all_readers_have(packed: Path) -> None:
    """Also those that were not the one that failed: the memory is somebody else's afterwards."""
    present: list[int] = []
    written: list[int] = []
    all_here = threading.Barrier(READERS)

    class BreakingMemory(HostMemory):
        """Refuses one chunk of each reader but the one that began last, which is slow."""

        def commit(self, offset: int, nbytes: int, staged: memoryview) -> None:
            present.append(threading.get_native_id())
            all_here.wait(DEADLINE_S)
            if threading.get_native_id() != max(present):
                raise RuntimeError("no such memory")
            threading.Event().wait(0.2)  # long enough for the others to be done
            written.append(offset)

    evict(packed)
    outcome = load(packed, [BreakingMemory(len(data)) for data in content(packed)])
    assert not outcome.complete
    assert len(written) == 1


def test_a_file_without_a_record_is_verified_before_it_is_mapped(packed: Path) -> None:
    forget(packed)
    memories = device_memories(packed)
    assert load(packed, memories).complete
    assert all(is_mapped(memory) for memory in memories)
    files = PackedCheckpoint(packed)
    assert all(was_verified(files.path(s.index), s.checksum) for s in files.manifest.segments)


@pytest.mark.parametrize("remembered", [True, False])
def test_a_warm_rotten_file_is_not_mapped(packed: Path, remembered: bool) -> None:
    """Whatever changes a file takes its record away, so the change is found."""
    if not remembered:
        forget(packed)
    expected = content(packed)
    path = packed / segment_file(1)
    rotten = bytearray(path.read_bytes())
    rotten[-1] ^= 1
    with path.open("r+b") as file:
        file.write(rotten)
    memories = device_memories(packed)
    sound = packed.parent / "sound"
    sound.mkdir()
    for name in ("manifest.json", *(segment_file(index) for index in range(4))):
        (sound / name).write_bytes((packed / name).read_bytes())
    (sound / segment_file(1)).write_bytes(rotten[:-1] + bytes([rotten[-1] ^ 1]))
    upstreams = [
        UpstreamSpec(peer_id="disk", local_folder=packed),
        UpstreamSpec(peer_id="b", local_folder=sound),
    ]
    assert load(packed, memories, upstreams).complete
    assert [bytes(m.view(0, m.nbytes)) for m in memories] == expected


def test_both_ways_to_ask_for_cached_pages_agree(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = PackedCheckpoint(packed)
    nbytes = files.manifest.segments[1].nbytes
    assert share_of(files, 1, 0, nbytes) == 1.0
    monkeypatch.setattr("layercast_agent.page_cache.CACHESTAT", 100_000)  # a kernel without it
    assert share_of(files, 1, 0, nbytes) == 1.0
    files.close()
    evict(packed)
    files = PackedCheckpoint(packed)
    assert share_of(files, 1, 4096, nbytes - 4096) == 0.0
    monkeypatch.undo()
    assert share_of(files, 1, 4096, nbytes - 4096) == 0.0


def entered_bytes(file: Path) -> int:
    """How much of a mapped file is in the page table of this process."""
    maps = Path("/proc/self/smaps").read_text().split(str(file), 1)[1]
    return 1024 * int(maps.split("Rss:", 1)[1].split()[0])


@pytest.mark.parametrize(
    "advice", [22, 1_000_000], ids=["this kernel", "a kernel without MADV_POPULATE_READ"]
)
def test_what_is_brought_in_is_there_before_its_first_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, advice: int
) -> None:
    monkeypatch.setattr("layercast_agent.page_cache.MADV_POPULATE_READ", advice)
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    with file.open("rb") as opened:
        os.fsync(opened.fileno())  # pages on their way to the disk are locked, and left out by the older way
        mapped = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
    assert entered_bytes(file) == 0
    assert bring_in(memoryview(mapped), share=1.0)
    assert entered_bytes(file) == 1 << 20


@pytest.mark.skipif(
    tuple(int(part) for part in os.uname().release.split(".")[:2]) < (5, 14), reason="the process would die"
)
def test_what_the_disk_cannot_give_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(8 * mmap.PAGESIZE))
    with file.open("r+b") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
        opened.truncate(mmap.PAGESIZE)
    assert not bring_in(memoryview(mapped), share=1.0)
    assert not bring_in(memoryview(mapped), share=0.5)


def test_a_record_belongs_to_one_content(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abcd")
    assert not was_verified(file, 7)
    remember_verified(file, 7)
    assert was_verified(file, 7)
    assert not was_verified(file, 8)
    copy = tmp_path / "copy"
    copy.write_bytes(b"abcd")
    os.setxattr(copy, VERIFIED_ATTRIBUTE, os.getxattr(file, VERIFIED_ATTRIBUTE))
    assert not was_verified(copy, 7)  # another inode
    os.utime(file, ns=(1, 1))
    assert not was_verified(file, 7)
    remember_verified(tmp_path / "nothing", 7)  # nothing to remember, nothing raised
    assert not was_verified(tmp_path / "nothing", 7)


def test_a_file_that_became_shorter_is_named_with_tensor_and_offset(packed: Path) -> None:
    files = PackedCheckpoint(packed)
    reader = PackedReader(files, direct=False)
    last = files.manifest.segments[1].tensors[-1]
    cut = files.data_start(1) + last.offset + 3
    os.truncate(files.path(1), cut)
    with pytest.raises(CheckpointError, match="truncated") as caught:
        reader.read(1, last.offset, allocate(last.nbytes))
    assert (caught.value.file, caught.value.tensor, caught.value.offset_bytes) == (
        files.path(1),
        last.name,
        cut,
    )
    reader.close()
    with pytest.raises(CheckpointError, match="cannot be read"):
        reader.read(2, 0, allocate(8))


def test_adopted_memory_ignores_what_still_arrives() -> None:
    """A peer's chunk that was under way when the segment was mapped must not be written into a file's pages."""
    memory = DeviceMemory(100, CPU)
    memory.adopt(memoryview(bytes(range(100))))
    staged = memory.staging(10, 5)
    staged[:] = b"xxxxx"
    memory.commit(10, 5, staged)
    assert bytes(memory.view(0, 100)) == bytes(range(100))
    with pytest.raises(ValueError, match="3 bytes for a memory of 100"):
        memory.adopt(memoryview(b"abc"))


def test_a_reserve_is_lent_once_and_again_after_a_reset() -> None:
    reserve = Reserve(2 * HUGE_BYTES)
    assert reserve.wait_touched(DEADLINE_S)
    first, second = reserve.take(HUGE_BYTES - 5), reserve.take(HUGE_BYTES)
    assert first is not None and second is not None
    first[:] = b"\x01" * len(first)
    second[:] = b"\x02" * len(second)
    assert first == b"\x01" * len(first)
    assert reserve.take(1) is None
    reserve.reset()
    assert reserve.take(2 * HUGE_BYTES) is not None
    (memory,) = slab_of([10], CPU, host=first)
    assert bytes(memory.tensor.numpy()) == b"\x01" * 10
