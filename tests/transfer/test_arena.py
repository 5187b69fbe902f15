"""The host pool's memory: what fits by its sum fits, nothing overlaps, and nothing is taken that is not there."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercast_agent.arena import ALIGN_BYTES, Arena, ArenaMemory, available_bytes
from layercast_agent.errors import NoCapacityError

PAGE = ALIGN_BYTES


def padded(nbytes: int, unit: int) -> int:
    """Most bytes of the arena that a memory may take: every unit at a page."""
    whole, rest = divmod(nbytes, unit)
    return whole * -(-unit // PAGE) * PAGE + -(-rest // PAGE) * PAGE


sizes = st.lists(
    st.tuples(st.integers(0, 12 * PAGE), st.booleans(), st.integers(0, 30)), min_size=1, max_size=30
)


@settings(max_examples=60, deadline=None)
@given(script=sizes, unit=st.sampled_from([PAGE, 2 * PAGE, 1000, PAGE + 1]))
def test_memories_never_overlap_and_what_fits_is_given(
    script: list[tuple[int, bool, int]], unit: int
) -> None:
    arena = Arena(24 * PAGE)
    held: list[tuple[ArenaMemory, bytes]] = []
    for nbytes, give_back, which in script:
        if give_back and held:
            arena.free(held.pop(which % len(held))[0])
            continue
        free = arena.nbytes - arena.used_bytes
        try:
            memory = arena.allocate(nbytes, unit=unit)
        except NoCapacityError:
            # A gap smaller than a unit is lost to it; everything else must be used.
            gaps = 1 + sum(len(m.extents) for m, _ in held)
            assert padded(nbytes, unit) > free - gaps * padded(unit, unit)
            continue
        content = os.urandom(nbytes)
        for start in range(0, nbytes, unit):
            memory.staging(start, min(unit, nbytes - start))[:] = content[start : start + unit]
        held.append((memory, content))
    for memory, content in held:
        assert memory.view(0, memory.nbytes) == content
        arena.free(memory)
    assert arena.used_bytes == 0
    arena.close()


def test_a_range_is_located_inside_one_extent_and_joined_across_two() -> None:
    arena = Arena(6 * PAGE)
    first, second, third = (arena.allocate(2 * PAGE, unit=PAGE) for _ in range(3))
    arena.free(first)
    arena.free(third)
    memory = arena.allocate(3 * PAGE, unit=PAGE)
    assert len(memory.extents) == 2
    assert memory.locate(2 * PAGE, PAGE) is not None and memory.locate(PAGE, 2 * PAGE) is None
    memory.staging(2 * PAGE, PAGE)[:2] = b"xy"
    assert bytes(memory.view(2 * PAGE - 1, 3)) == b"\0xy"
    with pytest.raises(ValueError, match="not one chunk"):
        memory.staging(PAGE, 2 * PAGE)
    arena.free(second)
    arena.close()


def test_all_pages_are_there_after_touching() -> None:
    arena = Arena(8 << 20)
    arena.touch()
    assert arena._toucher is not None
    arena._toucher.join(20)
    assert arena.touched_bytes == 8 << 20
    assert os.fstat(arena.reader_fd).st_blocks * 512 == 8 << 20
    arena.close()


def test_more_than_the_machine_has_is_refused_before_it_is_taken() -> None:
    with pytest.raises(NoCapacityError, match="available on this machine"):
        Arena(2 * available_bytes())


def test_a_reader_s_descriptor_cannot_be_mapped_writable() -> None:
    import mmap

    arena = Arena(PAGE)
    with pytest.raises(PermissionError):
        mmap.mmap(arena.reader_fd, PAGE)
    arena.close()
