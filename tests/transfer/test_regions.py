"""Regions: named, fenced, and never freed under a reader."""

from __future__ import annotations

import threading

import pytest

from layercast_agent.errors import NoCapacityError, RegionFencedError
from layercast_agent.regions import HostMemory, RegionTable


def test_a_read_sees_the_memory_itself() -> None:
    table = RegionTable()
    memory = HostMemory(bytearray(b"0123456789"))
    region = table.add(memory)
    assert region.nbytes == 10
    with table.reading(region.region_id, region.epoch, 2, 3) as view:
        assert bytes(view) == b"234"
        memory.staging(2, 1)[:] = b"x"
        assert bytes(view) == b"x34"
    with pytest.raises(ValueError, match="released"):
        view[0]


@pytest.mark.parametrize(
    ("id_delta", "epoch_delta", "offset", "nbytes"),
    [(1, 0, 0, 1), (0, 1, 0, 1), (0, -1, 0, 1), (0, 0, 8, 3), (0, 0, 11, 0), (0, 0, -1, 2), (0, 0, 0, -1)],
)
def test_other_names_and_ranges_are_refused(
    id_delta: int, epoch_delta: int, offset: int, nbytes: int
) -> None:
    table = RegionTable()
    region = table.add(HostMemory(10))
    with (
        pytest.raises(RegionFencedError),
        table.reading(region.region_id + id_delta, region.epoch + epoch_delta, offset, nbytes),
    ):
        pytest.fail("was readable")


def test_empty_reads_at_the_end_are_fine() -> None:
    table = RegionTable()
    region = table.add(HostMemory(10))
    with table.reading(region.region_id, region.epoch, 10, 0) as view:
        assert len(view) == 0


def test_two_starts_of_a_process_have_different_epochs() -> None:
    first, second = RegionTable().add(HostMemory(1)), RegionTable().add(HostMemory(1))
    assert first.epoch != second.epoch


def test_removal_refuses_new_readers_at_once_and_waits_for_old_ones() -> None:
    table = RegionTable()
    region = table.add(HostMemory(10))
    removed = threading.Event()

    def remove() -> None:
        table.remove(region.region_id, deadline_s=10)
        removed.set()

    with table.reading(region.region_id, region.epoch, 0, 10) as view:
        with pytest.raises(NoCapacityError, match="still being read by 1"):
            table.remove(region.region_id, deadline_s=0.01)
        with (
            pytest.raises(RegionFencedError),
            table.reading(region.region_id, region.epoch, 0, 1),
        ):
            pytest.fail("was readable")
        thread = threading.Thread(target=remove)
        thread.start()
        assert not removed.wait(0.05)
        assert view[0] == 0
    thread.join(5)
    assert removed.is_set()
    table.remove(region.region_id, deadline_s=0)  # unknown by now, and that is fine
