"""The cluster as a folder: `modelservices/*.yaml` and `cluster.json` in, `status/NAME.json` out.

Files are edited by people and replaced by programs, so every intermediate state must be harmless: a broken file
leaves the last good one in force, and a file that is missing counts as deleted only after a moment (an editor may
write by remove and create).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layercast_operator.cluster import Desired, InvalidModel
from layercast_operator.errors import ClusterFileError, ModelServiceError
from layercast_operator.modelservice import ModelService, parse_modelservice

_LOG = logging.getLogger(__name__)

DELETED_AFTER_S = 1.0
STATUS_EVERY_S = 1.0
FILE_BYTES_MAX = 1 << 20

_Stamp = tuple[int, int, int]


@dataclass(slots=True, kw_only=True)
class _File:
    """One YAML file: what it last held that was usable, and what is wrong with it now."""

    stamp: _Stamp | None = None
    good: ModelService | None = None
    problem: str = ""
    missing_since: float | None = None


@dataclass(slots=True, kw_only=True)
class _Written:
    text: str
    at: float


class LocalCluster:
    """Implements `Cluster` on a folder. `clock` gives seconds since the epoch and never steps back."""

    def __init__(self, root: Path, *, clock: Callable[[], float]) -> None:
        self._root = root
        self._services = root / "modelservices"
        self._statuses = root / "status"
        self._clock = clock
        self._files: dict[str, _File] = {}
        self._cluster_stamp: _Stamp | None = None
        self._agents: dict[str, str] = {}
        self._gateways: tuple[str, ...] = ()
        self._cluster_problem = f"{root / 'cluster.json'} is not there yet"
        self._written: dict[str, _Written] = {}

    async def desired(self) -> Desired:
        """What the folder says now."""
        return await asyncio.to_thread(self._read)

    async def last_status(self, name: str) -> Mapping[str, Any] | None:
        """The status file of `name`, when it can be read."""
        return await asyncio.to_thread(self._read_status, name)

    async def write_status(self, name: str, status: Mapping[str, Any]) -> None:
        """Replace the status file when it changed, and once a second as a sign of life."""
        text = json.dumps(status, indent=1, ensure_ascii=False) + "\n"
        now = self._clock()
        before = self._written.get(name)
        if before is not None and before.text == text and now - before.at < STATUS_EVERY_S:
            return
        try:
            await asyncio.to_thread(self._replace_status, name, text)
        except OSError:
            _LOG.exception("a status file cannot be written", extra={"model": name})
            return
        self._written[name] = _Written(text=text, at=now)

    async def forget(self, name: str) -> None:
        """Remove the status file."""
        self._written.pop(name, None)
        path = self._status_path(name)
        await asyncio.to_thread(path.unlink, missing_ok=True)

    def _status_path(self, name: str) -> Path:
        return self._statuses / f"{name}.json"

    def _read_status(self, name: str) -> Mapping[str, Any] | None:
        try:
            content = json.loads(self._status_path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def _replace_status(self, name: str, text: str) -> None:
        # Not flushed to the platter: after a power cut there is a new status within a second anyway.
        self._statuses.mkdir(parents=True, exist_ok=True)
        scratch = self._statuses / f".{name}.json.new"
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(self._status_path(name))

    def _read(self) -> Desired:
        self._read_cluster()
        complete, problem = self._read_services(), self._cluster_problem
        models: dict[str, ModelService] = {}
        owner: dict[str, str] = {}
        invalid: list[InvalidModel] = []
        for path_name, file in sorted(self._files.items()):
            if file.good is None:
                invalid.append(InvalidModel(name=Path(path_name).stem, problem=file.problem))
                complete = False
            elif file.good.name in models:
                text = f"{path_name}: the name {file.good.name!r} is taken by {owner[file.good.name]}"
                invalid.append(InvalidModel(name=Path(path_name).stem, problem=text))
            else:
                owner[file.good.name] = path_name
                models[file.good.name] = replace(file.good, problem=file.problem)
        return Desired(
            models=tuple(models.values()),
            invalid=tuple(entry for entry in invalid if entry.name not in models),
            agents=dict(self._agents),
            gateways=self._gateways,
            complete=complete,
            problem=problem,
        )

    def _read_services(self) -> bool:
        """Look at every file; False when the folder cannot be listed."""
        now = self._clock()
        try:
            found = sorted(
                path
                for path in self._services.iterdir()
                if path.suffix in {".yaml", ".yml"} and not path.name.startswith(".")
            )
        except OSError:
            return False
        for path in found:
            self._read_service(path)
        names = {path.name for path in found}
        for name in [name for name in self._files if name not in names]:
            file = self._files[name]
            file.missing_since = now if file.missing_since is None else file.missing_since
            if now - file.missing_since >= DELETED_AFTER_S:
                _LOG.info("a ModelService file is gone", extra={"file": name})
                del self._files[name]
        return True

    def _read_service(self, path: Path) -> None:
        file = self._files.setdefault(path.name, _File())
        file.missing_since = None
        try:
            stamp = _stamp(path)
            if stamp == file.stamp:
                return
            text = _text(path)
            service = parse_modelservice(text, file=path.name)
        except (OSError, ValueError) as error:
            self._broken(file, path, None, f"{path.name}: cannot be read: {error}")
        except ModelServiceError as error:
            self._broken(file, path, stamp, str(error))
        else:
            file.stamp, file.problem = stamp, ""
            file.good = self._next_generation(file.good, service, created_unix_s=stamp[0] // 10**9)

    def _broken(self, file: _File, path: Path, stamp: _Stamp | None, problem: str) -> None:
        file.stamp = stamp
        if problem != file.problem:
            _LOG.warning("a ModelService file cannot be used", extra={"file": path.name, "problem": problem})
        file.problem = problem

    def _next_generation(
        self, before: ModelService | None, service: ModelService, *, created_unix_s: int
    ) -> ModelService:
        """The service with its generation: one more for each change of meaning, never less than was reported."""
        if before is None or before.name != service.name:
            told = (self._read_status(service.name) or {}).get("observedGeneration")
            generation = max(told, 1) if isinstance(told, int) else 1
            return replace(service, generation=generation, created_unix_s=created_unix_s)
        same = replace(service, generation=before.generation, created_unix_s=before.created_unix_s)
        if same == before:
            return before
        return replace(same, generation=before.generation + 1)

    def _read_cluster(self) -> None:
        path = self._root / "cluster.json"
        try:
            stamp = _stamp(path)
            if stamp == self._cluster_stamp:
                return
            agents, gateways = _cluster_of(_text(path))
        except (OSError, ValueError, ClusterFileError) as error:
            problem = f"cluster.json: {error}"
            if problem != self._cluster_problem:
                _LOG.warning("the cluster file cannot be used", extra={"problem": problem})
            self._cluster_problem = problem
            return
        self._cluster_stamp, self._agents, self._gateways = stamp, agents, gateways
        self._cluster_problem = ""


def _stamp(path: Path) -> _Stamp:
    seen = path.stat()
    return (seen.st_mtime_ns, seen.st_size, seen.st_ino)


def _text(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        text = file.read(FILE_BYTES_MAX + 1)
    if len(text) > FILE_BYTES_MAX:
        raise ValueError(f"larger than {FILE_BYTES_MAX} bytes")
    return text


def _cluster_of(text: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Agents and gateways of a cluster file. Raises ClusterFileError, or ValueError when it is not JSON."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ClusterFileError("must be a mapping with agents and gateways")
    agents, gateways = content.get("agents", {}), content.get("gateways", [])
    if not isinstance(agents, dict) or not all(_is_address(address) for address in agents.values()):
        raise ClusterFileError("agents: must map node names to host:port")
    if not isinstance(gateways, list) or not all(_is_address(address) for address in gateways):
        raise ClusterFileError("gateways: must be a list of host:port")
    return {str(node): str(address) for node, address in agents.items()}, tuple(gateways)


def _is_address(value: object) -> bool:
    return isinstance(value, str) and value.rpartition(":")[2].isdecimal() and value.rpartition(":")[0] != ""
