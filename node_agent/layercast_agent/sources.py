"""Where checkpoints come from: `file://`, `pvc://`, `hf://`, `s3://` and `gs://`, each resolved to a local folder.

`parse_source` is pure and tells a bad source at once; `fetch` may take long and is where the hub's exceptions
end. Their texts say whose fault it is, because the remedies differ: the ModelService names something that is not
there, the credentials do not suffice, or the network is away and nothing is wrong.
"""

from __future__ import annotations

import errno
import hashlib
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from layercast_agent.errors import CheckpointError, NoCapacityError
from layercast_agent.object_store import ObjectSource, Report, download

PVC_ROOT = Path("/var/lib/layercast/pvc")

# Weights in the two forms that packing reads, never *.bin, *.pt or other pickle; nothing from subfolders.
HUB_PATTERNS = ("model.safetensors", "model-*.safetensors", "*.json", "*.jinja")
HUB_IGNORED = ("*/*",)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSource:
    """`file:///abs/path`: a folder of this machine."""

    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeSource:
    """`pvc://claim/path`: a folder of a volume, mounted below the node's volume root under its claim's name."""

    claim: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """`hf://org/name[@revision]`: a repository of the Hugging Face hub; revision "" is its default branch."""

    repository: str
    revision: str


Source = FolderSource | VolumeSource | HubSource | ObjectSource


def parse_source(source: str, revision: str = "") -> Source:
    """What a source string names. CheckpointError when nobody could fetch it."""
    try:
        parts = urlsplit(source)
    except ValueError as error:
        raise CheckpointError(f"source {source!r} is not a URL: {error}") from error
    path = unquote(parts.path)
    if "\0" in path or parts.query or parts.fragment:
        raise CheckpointError(f"source {source!r} has parts that name nothing (query, fragment or NUL)")
    match parts.scheme:
        case "file":
            return _parse_folder(source, parts.netloc, path)
        case "pvc":
            return _parse_volume(source, parts.netloc, path)
        case "hf":
            return _parse_hub(source, parts.netloc + path, revision)
        case "s3" | "gs":
            return _parse_object(source, parts.scheme, parts.netloc, path=path, revision=revision)
        case _:
            raise CheckpointError(
                f"source {source!r} has none of the schemes file://, pvc://, hf://, s3:// and gs://"
            )


def fetch(
    source: Source, *, report: Report, pvc_root: Path = PVC_ROOT, downloads: Path | None = None
) -> Path:
    """The local folder of a source, downloaded when it is remote; downloads resume where they stopped.

    Objects of buckets come into folders below `downloads`; hf:// has a cache of its own.
    CheckpointError says whose fault it is when there is no such folder.
    """
    match source:
        case FolderSource(folder=folder):
            return _existing(folder, f"file://{folder}")
        case VolumeSource(claim=claim, path=path):
            return _volume_folder(pvc_root / claim, path)
        case HubSource():
            return _download(source, report)
        case ObjectSource():
            assert downloads is not None, "buckets need a place for what they send"
            return download(source, download_folder(downloads, source), patterns=HUB_PATTERNS, report=report)


def download_folder(downloads: Path, source: ObjectSource) -> Path:
    """Where the objects of a source are gathered."""
    return downloads / hashlib.sha256(str(source).encode()).hexdigest()[:32]


def _parse_folder(source: str, host: str, path: str) -> FolderSource:
    if host not in ("", "localhost") or not path.startswith("/"):
        raise CheckpointError(
            f"source {source!r} must be file:///absolute/path: agents share no folder names"
        )
    return FolderSource(folder=Path(path))


def _parse_volume(source: str, claim: str, path: str) -> VolumeSource:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", claim):
        raise CheckpointError(
            f"source {source!r} must be pvc://claim/path, the claim named as Kubernetes does"
        )
    if ".." in Path(path).parts:
        raise CheckpointError(f"source {source!r} leaves its volume")
    return VolumeSource(claim=claim, path=path.strip("/"))


def _parse_hub(source: str, name: str, revision: str) -> HubSource:
    repository, _, inline = name.partition("@")
    if not _HUB_NAME.fullmatch(repository) or "--" in repository or ".." in repository:
        raise CheckpointError(f"source {source!r} must be hf://organisation/name")
    if inline and revision and inline != revision:
        raise CheckpointError(f"source {source!r} names revision {inline}, spec.model.revision {revision}")
    return HubSource(repository=repository, revision=inline or revision)


def _parse_object(source: str, scheme: str, bucket: str, *, path: str, revision: str) -> ObjectSource:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", bucket) or ".." in Path(path).parts:
        raise CheckpointError(f"source {source!r} must be {scheme}://bucket/path")
    if revision:
        raise CheckpointError(
            f"source {source!r} is a bucket, which has no revisions: spec.model.revision must be empty"
        )
    return ObjectSource(scheme=scheme, bucket=bucket, prefix=path.strip("/"))


def _existing(folder: Path, named: str) -> Path:
    if not folder.is_dir():
        raise CheckpointError(
            f"{named} names no folder on this node; spec.model.source is wrong", file=folder
        )
    return folder


def _volume_folder(mount: Path, path: str) -> Path:
    if not mount.is_dir():
        raise CheckpointError("the volume is not mounted on this node", file=mount)
    folder = (mount / path).resolve()
    # A link inside the volume could lead anywhere on the node.
    if not folder.is_relative_to(mount.resolve()):
        raise CheckpointError("the path leaves its volume", file=mount / path)
    return _existing(folder, f"pvc://{mount.name}/{path}")


def _download(source: HubSource, report: Report) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            source.repository,
            revision=source.revision or None,
            allow_patterns=list(HUB_PATTERNS),
            ignore_patterns=list(HUB_IGNORED),
            tqdm_class=_reporting_bar(report),
        )
    except (errors.HTTPError, errors.EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoCapacityError(f"the disk of the hub's cache is full: {error.strerror}") from error
        raise CheckpointError(_whose_fault(source, error)) from error
    folder = Path(found)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{_name(source)} has no safetensors weights; pickle can execute code when loaded and is refused"
        )
    return folder


def _name(source: HubSource) -> str:
    return f"hf://{source.repository}" + (f"@{source.revision}" if source.revision else "")


def _whose_fault(source: HubSource, error: Exception) -> str:
    from huggingface_hub import errors

    name = _name(source)
    match error:
        case errors.GatedRepoError():
            return f"{name} is gated: its owner must grant access to the token in HF_TOKEN"
        case errors.RevisionNotFoundError():
            return f"{name}: the repository has no such revision; spec.model.revision is wrong"
        case errors.RepositoryNotFoundError():
            return f"{name}: no such repository, or HF_TOKEN may not see it; spec.model.source is wrong"
        case errors.LocalEntryNotFoundError():
            return f"{name} is not complete in the cache and the hub does not answer; try again when it does"
        case errors.HfHubHTTPError():
            return f"{name}: the hub answered {error.response.status_code}; the hub's fault, try again"
        case errors.HFValidationError():
            return f"{name} is not a repository's name; spec.model.source is wrong"
        case _:
            return f"{name}: the download failed, try again: {type(error).__name__} {error}"


def _reporting_bar(report: Report) -> type[Any]:
    """A progress bar that draws nothing and tells `report`: the one way in which the library tells bytes."""
    from huggingface_hub.utils import tqdm

    lock = threading.Lock()

    class ReportingBar(tqdm):  # type: ignore[misc]
        """Stands in for the library's own bars, of which one counts the bytes of all files."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts = kwargs.get("name") == "huggingface_hub.snapshot_download"
            self._done_bytes = 0
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts:
                with lock:  # several files download at once
                    self._done_bytes += int(n or 0)
                    report(self._done_bytes, max(int(self.total or 0), self._done_bytes))
            return None

    return ReportingBar
