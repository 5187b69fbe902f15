"""Residency: what is verified, in the wire's form, and who is told."""

from __future__ import annotations

from types import ModuleType

import pytest

from layercast_agent.residency import Residency


def test_marks_make_segments_and_the_checkpoint_complete(synthetic: ModuleType) -> None:
    residency = Residency(synthetic.make([25, 10, 9, 1], chunk_bytes=10).manifest)
    assert residency.bitmap(0) == b"\x00"
    assert not residency.mark(0, 2)
    assert not residency.mark(0, 0)
    assert residency.bitmap(0) == b"\x05"
    assert residency.has(0, 2) and not residency.has(0, 1)
    assert residency.done_bytes == 15
    assert residency.mark(0, 1)
    assert not residency.mark(0, 1)  # once is enough
    assert residency.segment_complete(0) and residency.layers_resident == 0
    assert residency.mark(2, 0)
    assert residency.layers_resident == 1
    assert residency.mark(3, 0) and residency.mark(1, 0)
    assert residency.complete and residency.layers_resident == 2 and residency.done_bytes == 45
    assert residency.version == 6


def test_bits_are_least_significant_first(synthetic: ModuleType) -> None:
    residency = Residency(synthetic.make([100, 1, 1], chunk_bytes=10).manifest)
    residency.mark(0, 8)
    residency.mark(0, 9)
    assert residency.bitmap(0) == b"\x00\x03"


def test_chunks_that_do_not_exist_are_an_error(synthetic: ModuleType) -> None:
    residency = Residency(synthetic.make([25, 10, 10], chunk_bytes=10).manifest)
    for chunk in (3, -1):
        with pytest.raises(IndexError):
            residency.mark(0, chunk)
        with pytest.raises(IndexError):
            residency.has(0, chunk)


def test_a_complete_one_has_everything(synthetic: ModuleType) -> None:
    manifest = synthetic.make([95, 10, 10], chunk_bytes=10).manifest
    residency = Residency(manifest, complete=True)
    assert residency.complete and residency.done_bytes == manifest.nbytes
    assert residency.bitmap(0) == b"\xff\x03"


def test_snapshots_tell_what_changed_since(synthetic: ModuleType) -> None:
    residency = Residency(synthetic.make([20, 10, 10], chunk_bytes=10).manifest)
    version, everything = residency.snapshot()
    assert everything == {0: b"\x00", 1: b"\x00", 2: b"\x00"}
    assert residency.snapshot(since=version) == (version, {})
    residency.mark(2, 0)
    residency.mark(0, 1)
    later, changed = residency.snapshot(since=version)
    assert later == version + 2
    assert changed == {0: b"\x02", 2: b"\x01"}


def test_subscribers_are_called_after_each_change_until_they_leave(synthetic: ModuleType) -> None:
    residency = Residency(synthetic.make([20, 10, 10], chunk_bytes=10).manifest)
    seen: list[int] = []
    leave = residency.subscribe(lambda: seen.append(residency.version))
    residency.mark(0, 0)
    residency.mark(0, 0)
    residency.mark(1, 0)
    leave()
    leave()
    residency.mark(2, 0)
    assert seen == [1, 2]
