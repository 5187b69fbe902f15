"""Checkpoints in buckets (`s3://`, `gs://`): a folder of objects becomes a folder of files, resumably and checked.

obstore does the requests, their retries and the credentials of the environment (`AWS_*`, `GOOGLE_*`, workload
identity); its exceptions end here. What it does not do is ours: ranges that follow one another on disk, so that a
download goes on where it stopped, whoever stopped it; one version of each object, named by its ETag, or none; and a
comparison with the digests that the bucket gives.

A bucket's ETags are MD5 digests of objects that were uploaded in one piece, unless the bucket encrypts with keys of
its own. Which kind this one gives is seen at config.json, which is small and always there.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import itertools
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercast_agent.errors import CheckpointError, NoCapacityError
from layercast_agent.free_space import require_free

RANGE_BYTES = 16 * 1024 * 1024
RANGES_AT_ONCE = 6  # of one file; a single stream of a bucket carries a tenth of what a node can take
REQUEST_S = 60  # one range; a link of 3 Mbit/s still makes it
RETRIES = 4
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
SUMS_FILE = "SHA256SUMS"
CONFIG_FILE = "config.json"

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectSource:
    """`s3://bucket/prefix` or `gs://bucket/prefix`: the objects directly below the prefix."""

    scheme: str
    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}".rstrip("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Object:
    path: str
    nbytes: int
    etag: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


def download(
    source: ObjectSource, folder: Path, *, patterns: tuple[str, ...], report: Report, store: Any = None
) -> Path:
    """Fetch the objects whose names match into `folder`, which may hold parts from before; returns it.

    CheckpointError says whose fault it is; NoCapacityError: the disk is too small.
    """
    with _errors(source):
        store = store or _open(source)
        objects = _list(store, source, (*patterns, SUMS_FILE))
        folder.mkdir(parents=True, exist_ok=True)
        _forget_others(folder, objects)
        fetcher = _Fetcher(store=store, source=source, folder=folder, objects=objects, report=report)
        fetcher.run()
    return folder


class _Fetcher:
    """One download. A file has its name once it is complete and checked, and another one before."""

    def __init__(
        self, *, store: Any, source: ObjectSource, folder: Path, objects: list[_Object], report: Report
    ) -> None:
        self._store = store
        self._source = source
        self._folder = folder
        self._objects = objects
        self._report = report
        self._total = sum(item.nbytes for item in objects)
        self._done = 0
        self._lock = threading.Lock()
        self._sums: dict[str, str] = {}
        self._etags_are_digests = False

    def run(self) -> None:
        held = sum(size for item in self._objects if (size := self._held_bytes(item)))
        require_free(self._folder, self._total - held, what=f"{self._source}")
        self._report(0, self._total)
        by_name = {item.name: item for item in self._objects}
        # First what the others are checked by.
        for name in (SUMS_FILE, CONFIG_FILE):
            if name in by_name:
                self._fetch(by_name.pop(name))
        for item in by_name.values():
            self._fetch(item)

    def _fetch(self, item: _Object) -> None:
        path, part = self._folder / item.name, _part(self._folder, item)
        marker = _marker(part)
        if path.exists() and marker.exists() and path.stat().st_size == item.nbytes:
            self._tell(item.nbytes)
        else:
            md5, sha256 = self._fill(item, part)
            self._check(item, part, md5, sha256)
            part.rename(path)
            marker.touch()
        if item.name == CONFIG_FILE:
            self._etags_are_digests = _md5_of(path) == item.etag
        elif item.name == SUMS_FILE:
            self._sums = _parse_sums(path.read_text(errors="replace"))

    def _fill(self, item: _Object, part: Path) -> tuple[str, str]:
        """Completes the part; returns its MD5 and sha256, both over all of it."""
        md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
        with part.open("ab+") as file:
            file.seek(0)
            while block := file.read(RANGE_BYTES):
                md5.update(block)
                sha256.update(block)
                self._tell(len(block))
            for data in self._ranges(item, file.tell()):
                file.write(data)
                file.flush()  # whoever is killed now goes on from here
                md5.update(data)
                sha256.update(data)
                self._tell(len(data))
        return md5.hexdigest(), sha256.hexdigest()

    def _ranges(self, item: _Object, start: int) -> Iterator[memoryview]:
        """What is missing, in order, a few requests ahead."""
        with ThreadPoolExecutor(RANGES_AT_ONCE, thread_name_prefix="download") as pool:
            waiting: deque[Future[memoryview]] = deque()
            starts = iter(range(start, item.nbytes, RANGE_BYTES))
            try:
                for offset in itertools.chain(starts, [None] * RANGES_AT_ONCE):
                    if offset is not None:
                        waiting.append(pool.submit(self._range, item, offset))
                    if waiting and (offset is None or len(waiting) == RANGES_AT_ONCE):
                        yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _range(self, item: _Object, offset: int) -> memoryview:
        end = min(offset + RANGE_BYTES, item.nbytes)
        # Some servers answer a range that is everything as if none had been asked for.
        options: Any = {"range": (offset, end)} if end - offset < item.nbytes else {}
        if item.etag:
            options["if_match"] = f'"{item.etag}"'
        import obstore

        data = memoryview(obstore.get(self._store, item.path, options=options).bytes())
        if len(data) != end - offset:
            raise CheckpointError(
                f"{self._source}: {item.name} gave {len(data)} of {end - offset} bytes at {offset}; try again"
            )
        return data

    def _check(self, item: _Object, part: Path, md5: str, sha256: str) -> None:
        wrong = ""
        if part.stat().st_size != item.nbytes:
            wrong = f"has {part.stat().st_size} bytes, the bucket says {item.nbytes}"
        elif item.name in self._sums and sha256 != self._sums[item.name]:
            wrong = f"has sha256 {sha256}, {SUMS_FILE} says {self._sums[item.name]}"
        elif self._etags_are_digests and _is_md5(item.etag) and md5 != item.etag:
            wrong = f"has MD5 {md5}, the bucket says {item.etag}"
        if wrong:
            part.unlink()  # going on from rot would keep it
            raise CheckpointError(f"{self._source}: {item.name} {wrong}; downloaded anew when tried again")

    def _held_bytes(self, item: _Object) -> int:
        for path in (self._folder / item.name, _part(self._folder, item)):
            with contextlib.suppress(OSError):
                return path.stat().st_size
        return 0

    def _tell(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._report(self._done, self._total)


def _open(source: ObjectSource) -> Any:
    from obstore.store import GCSStore, S3Store

    retry: Any = {"max_retries": RETRIES}
    options: Any = {"timeout": f"{REQUEST_S}s", "connect_timeout": "10s"}
    if source.scheme == "gs":
        return GCSStore(source.bucket, client_options=options, retry_config=retry)
    named = (os.environ.get(name, "") for name in ENDPOINTS)
    endpoint = next(filter(None, named), "")
    config: Any = {"endpoint": endpoint} if endpoint else {}
    # Plain HTTP is what whoever wrote http:// asked for, inside a cluster as a rule.
    options |= {"allow_http": True} if endpoint.startswith("http://") else {}
    return S3Store(source.bucket, config=config, client_options=options, retry_config=retry)


def _list(store: Any, source: ObjectSource, patterns: tuple[str, ...]) -> list[_Object]:
    import obstore

    listed = obstore.list_with_delimiter(store, source.prefix or None)
    found = [
        _Object(path=item["path"], nbytes=item["size"], etag=(item["e_tag"] or "").strip('"'))
        for item in listed["objects"]
    ]
    wanted = [item for item in found if any(fnmatch.fnmatchcase(item.name, p) for p in patterns)]
    if not found:
        raise CheckpointError(f"{source}: nothing lies there; spec.model.source is wrong")
    if not any(item.name.endswith(".safetensors") for item in wanted):
        raise CheckpointError(
            f"{source} has no safetensors weights; pickle can execute code when loaded and is refused"
        )
    return sorted(wanted, key=lambda item: item.name)


def _forget_others(folder: Path, objects: list[_Object]) -> None:
    """Files and parts of objects that have changed or are gone since the last try."""
    kept = set()
    for item in objects:
        part = _part(folder, item)
        kept |= {part.name, _marker(part).name}
        if _marker(part).exists():
            kept.add(item.name)
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()


def _part(folder: Path, item: _Object) -> Path:
    """Where one version of an object is gathered."""
    version = hashlib.sha256(f"{item.etag} {item.nbytes}".encode()).hexdigest()[:16]
    return folder / f"{item.name}.{version}.part"


def _marker(part: Path) -> Path:
    """Says which version the complete file is."""
    return part.with_name(f".{part.name}.done")


@contextlib.contextmanager
def _errors(source: ObjectSource) -> Iterator[None]:
    """No exception of the library leaves this file; each text says whose fault it is."""
    from obstore import exceptions

    try:
        yield
    except exceptions.BaseError as error:
        raise CheckpointError(f"{source}{_whose_fault(source, error)}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoCapacityError(f"the disk is full: {error.strerror}") from error
        raise CheckpointError(
            f"{source}: cannot be written: {error.strerror}", file=error.filename
        ) from error


def _whose_fault(source: ObjectSource, error: Exception) -> str:
    """What follows the source's name. Some errors have a type, those of listings tell a status in their text only."""
    status = re.search(r"non-2xx status code: (\d{3})", str(error))
    match type(error).__name__, status.group(1) if status else "":
        case ("NotFoundError", _) | (_, "404"):
            return ": no such bucket or object; spec.model.source is wrong"
        case ("PermissionDeniedError" | "UnauthenticatedError", _) | (_, "401" | "403"):
            return f": the agent's credentials may not read it ({_variables(source)})"
        case ("PreconditionError", _) | (_, "412" | "416"):
            return " was changed while it was downloaded; try again"
        case _:
            text = re.sub(r"\s+", " ", str(error))[:300]
            return f": the bucket does not answer as it should; try again: {text}"


def _variables(source: ObjectSource) -> str:
    return "AWS_ACCESS_KEY_ID and others" if source.scheme == "s3" else "GOOGLE_APPLICATION_CREDENTIALS"


def _is_md5(etag: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", etag) is not None


def _md5_of(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _parse_sums(text: str) -> dict[str, str]:
    """Lines as sha256sum writes them: digest, space, space or star, name."""
    found = re.findall(r"^([0-9a-f]{64}) [ *](?:\./)?(.+)$", text, flags=re.MULTILINE)
    return {name: digest for digest, name in found}
