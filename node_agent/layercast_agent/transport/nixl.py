"""One-sided reads of peers' memory by NIXL (UCX underneath): RDMA where there is a network card for it.

The library has one door, here, and one owner, `NixlPlane`. What it does badly is done by us: it has no deadlines (a
stopped peer stays "in progress" for ever), its progress thread costs most of a core when idle, its listener
authenticates nobody, and it may crash when a process ends. So every read has a deadline, one thread of ours drives
it and sleeps when there is nothing to do, descriptions travel over PeerService, and only processes that end with
`os._exit` own one (workers do: each is its agent's child).

A read that failed may still write until its peer is forgotten, which takes the connection down; `forget` is called
before anybody says that the memory is quiet.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from layercast.peer.v1alpha1 import peer_pb2

from layercast_agent.errors import AgentError, PeerLostError, PeerRefusedError, RegionFencedError
from layercast_agent.regions import Location, RegionRef, RegionTable

BUSY_S = 0.0003  # between looks while something moves
IDLE_S = 0.01  # software transports need the owner's help when a peer reads
FORM = "layercast-1"

Done = Callable[[AgentError | None], None]


class NixlUnavailableError(AgentError):
    """The library is not installed or does not start; the text says why."""


@dataclass(slots=True, kw_only=True)
class _Registered:
    handle: Any
    location: Location
    users: int = 1


@dataclass(slots=True, kw_only=True)
class _Read:
    handle: Any
    peer: str
    ends_at: float
    deadline_s: float
    nbytes: int
    done: Done


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteRegions:
    """What a peer described: its name in the library, and where its regions lie."""

    peer: str
    places: Mapping[tuple[int, int], Location]

    def find(self, region: RegionRef) -> Location:
        """RegionFencedError for a region or an epoch that the peer did not describe."""
        place = self.places.get((region.region_id, region.epoch))
        if place is None:
            raise RegionFencedError(f"region {region.region_id} of epoch {region.epoch} is not described")
        return place


class NixlPlane:
    """This process's end of one-sided reads. Thread-safe."""

    def __init__(self, table: RegionTable) -> None:
        """Describes regions of `table`. NixlUnavailableError."""
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        try:
            api = importlib.import_module("nixl_cu12._api")
            config = api.nixl_agent_config(
                enable_prog_thread=False, enable_listen_thread=False, backends=["UCX"]
            )
            self._agent = api.nixl_agent(f"layercast-{uuid.uuid4().hex}", config)
            self.library = f"nixl {importlib.import_module('importlib.metadata').version('nixl-cu12')} {FORM}"
        except Exception as error:
            raise NixlUnavailableError(f"NIXL does not start: {type(error).__name__}: {error}") from error
        self._table = table
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._registered: dict[int, _Registered] = {}  # by address
        self._described: dict[int, int] = {}  # region id -> address
        self._reads: list[_Read] = []
        self._peers: dict[str, int] = {}  # how many use each
        self._closed = False
        self.read_bytes = 0
        """Bytes that came by one-sided reads so far."""
        table.on_remove = self._withdraw
        self._thread = threading.Thread(target=self._progress, name="nixl", daemon=True)
        self._thread.start()

    # What others read here

    def describe(self, regions: tuple[RegionRef, ...]) -> peer_pb2.DescribeRegionsResponse:
        """For a peer's `add_peer`. AgentError: memory that no card can read, or too little may be locked."""
        answer = peer_pb2.DescribeRegionsResponse(library=self.library)
        for region in regions:
            location = self._expose(region)
            entry = answer.regions.add(
                address=location.address, memory_kind=location.kind, device=location.device
            )
            entry.region.region_id, entry.region.epoch = region.region_id, region.epoch
            entry.region.size_bytes = region.nbytes
        with self._lock:
            answer.agent_metadata = self._agent.get_agent_metadata()
        return answer

    def _expose(self, region: RegionRef) -> Location:
        locate = getattr(self._table.memory(region.region_id), "location", None)
        if locate is None:
            raise PeerRefusedError("this copy cannot be read one-sidedly")
        location: Location = locate()
        with self._lock:
            if region.region_id not in self._described:
                self._register(location)
                self._described[region.region_id] = location.address
        return location

    def _withdraw(self, region_id: int) -> None:
        with self._lock:
            address = self._described.pop(region_id, None)
            if address is not None:
                self._release(address)

    # What is read from others

    def add_peer(self, description: peer_pb2.DescribeRegionsResponse) -> RemoteRegions:
        """PeerRefusedError: another version, or not a description; `forget` it when its link ends."""
        if description.library != self.library:
            raise PeerRefusedError(f"the peer reads with {description.library!r}, not {self.library!r}")
        with self._lock, _library_errors("a peer's description is not usable"):
            peer = self._agent.add_remote_agent(description.agent_metadata).decode()
            self._peers[peer] = self._peers.get(peer, 0) + 1
        places = {
            (entry.region.region_id, entry.region.epoch): Location(
                address=entry.address,
                nbytes=entry.region.size_bytes,
                kind=entry.memory_kind,
                device=entry.device,
            )
            for entry in description.regions
        }
        return RemoteRegions(peer=peer, places=places)

    def forget(self, peer: str) -> None:
        """Ends the connection: all its reads fail now, and none of them writes any more."""
        with self._lock:
            failed = [read for read in self._reads if read.peer == peer]
            self._reads = [read for read in self._reads if read.peer != peer]
            for read in failed:
                self._drop(read)
            left = self._peers.pop(peer, 1) - 1
            if left and not failed:
                self._peers[peer] = left
            else:
                with contextlib.suppress(Exception):
                    self._agent.remove_remote_agent(peer)
        for read in failed:
            read.done(PeerLostError("the connection was ended"))

    @contextlib.contextmanager
    def registered(self, location: Location) -> Iterator[None]:
        """Local memory may be read into for the length of the block."""
        with self._lock:
            self._register(location)
        try:
            yield
        finally:
            with self._lock:
                self._release(location.address)

    def read(
        self, remote: RemoteRegions, source: Location, target: Location, *, deadline_s: float, done: Done
    ) -> None:
        """Copy `source` of a peer into `target`, which is registered; `done` is called once, from our thread."""
        if source.nbytes != target.nbytes:
            raise ValueError(f"{source.nbytes} bytes into {target.nbytes}")
        with self._lock, _library_errors("a read was not accepted"):
            local = self._descriptors(target)
            handle = self._agent.initialize_xfer("READ", local, self._descriptors(source), remote.peer)
            read = _Read(
                handle=handle,
                peer=remote.peer,
                ends_at=time.monotonic() + deadline_s,
                deadline_s=deadline_s,
                nbytes=target.nbytes,
                done=done,
            )
            self._agent.transfer(handle)
            self._reads.append(read)
            self._wake.notify_all()

    def close(self) -> None:
        """Stop; the library stays loaded, so the process must end with `os._exit`."""
        for peer in list(self._peers):
            self.forget(peer)
        with self._lock:
            self._closed = True
            self._wake.notify_all()
        self._thread.join(5)

    def _descriptors(self, location: Location) -> Any:
        return self._agent.get_xfer_descs(
            [(location.address, location.nbytes, location.device)], location.kind
        )

    def _register(self, location: Location) -> None:
        known = self._registered.get(location.address)
        if known is not None and known.location.nbytes >= location.nbytes:
            known.users += 1
            return
        with _library_errors(f"{location.nbytes} bytes could not be registered (memlock?)"):
            handle = self._agent.register_memory(
                [(location.address, location.nbytes, location.device, "")], location.kind
            )
        self._registered[location.address] = _Registered(handle=handle, location=location)
        self._wake.notify_all()

    def _release(self, address: int) -> None:
        known = self._registered.get(address)
        if known is None:
            return
        known.users -= 1
        if not known.users:
            del self._registered[address]
            with contextlib.suppress(Exception):
                self._agent.deregister_memory(known.handle)

    # Our thread

    def _progress(self) -> None:
        moved_at = 0.0
        while True:
            with self._lock:
                while not (self._closed or self._reads or self._registered):
                    self._wake.wait()
                if self._closed:
                    return
                with contextlib.suppress(Exception):
                    self._agent.get_new_notifs()  # what makes the library look at its sockets
                ended = self._ended()
            for read, error in ended:
                read.done(error)
            if self._reads or ended:
                moved_at = time.monotonic()
            with self._lock:
                busy = time.monotonic() - moved_at < 1.0 or os.environ.get("UCX_TLS", "").startswith("tcp")
                if not ended:
                    self._wake.wait(BUSY_S if busy else IDLE_S)

    def _ended(self) -> list[tuple[_Read, AgentError | None]]:
        now = time.monotonic()
        ended: list[tuple[_Read, AgentError | None]] = []
        for read in self._reads:
            error: AgentError | None = None
            try:
                state = self._agent.check_xfer_state(read.handle)
            except Exception as problem:
                state, error = "ERR", PeerLostError(f"{type(problem).__name__}: {problem}")
            if state == "DONE":
                self.read_bytes += read.nbytes
                ended.append((read, None))
            elif state != "PROC":
                ended.append((read, error or PeerLostError("the read failed")))
            elif now >= read.ends_at:
                ended.append((read, PeerLostError(f"no answer within {read.deadline_s:g} s")))
        over = {id(read) for read, _ in ended}
        self._reads = [read for read in self._reads if id(read) not in over]
        for read, _ in ended:
            self._drop(read)
        return ended

    def _drop(self, read: _Read) -> None:
        with contextlib.suppress(Exception):
            read.handle.release()


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """No exception of the library leaves this file."""
    try:
        yield
    except AgentError:
        raise
    except Exception as error:
        raise PeerLostError(f"{what}: {type(error).__name__}: {error}") from error
