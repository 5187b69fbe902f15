"""Where a local cluster keeps its files, and how they are replaced without a reader ever seeing half of one.

The folder is the local mode's stand-in for the Kubernetes API: `modelservices/` is what is wanted,
`status/` is what the operator saw. Everything here is plain text, so `cat` works as well as `layercast
get`."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercast_cli.errors import ClusterError


def default_state_dir() -> Path:
    """`$LAYERCAST_STATE_DIR`, or `layercast` in the user's state folder of the XDG convention."""
    named = os.environ.get("LAYERCAST_STATE_DIR")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "layercast"


def write_atomic(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Replaces `path` by `text`: a reader sees the old file or the new one, also after a power cut."""
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, mode)  # noqa: PTH101 - mkstemp speaks strings
        os.replace(scratch, path)  # noqa: PTH105
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDir:
    """The names inside one state folder."""

    root: Path

    @property
    def services(self) -> Path:
        """One YAML file for each wanted ModelService."""
        return self.root / "modelservices"

    @property
    def status(self) -> Path:
        """One JSON file for each ModelService, written by the operator."""
        return self.root / "status"

    @property
    def logs(self) -> Path:
        """One log file for each process."""
        return self.root / "logs"

    @property
    def pids(self) -> Path:
        """One file for each process that `layercast up` started, holding its process id."""
        return self.root / "pids"

    @property
    def cluster_file(self) -> Path:
        """Addresses of agents and gateways, read by the operator."""
        return self.root / "cluster.json"

    @property
    def token_file(self) -> Path:
        """The secret that peers show each other."""
        return self.root / "token"

    @property
    def certificates(self) -> Path:
        """A folder with certificates for each role, when the cluster runs with TLS."""
        return self.root / "tls"

    @property
    def about_file(self) -> Path:
        """What `layercast get` wants to know of the cluster as a whole."""
        return self.root / "up.json"

    @property
    def lock_file(self) -> Path:
        """Locked while a cluster runs on this folder."""
        return self.root / "lock"

    def node(self, name: str) -> Path:
        """What would be one machine's disk."""
        return self.root / name

    def create(self) -> None:
        """Makes the folders."""
        for folder in (self.root, self.services, self.status, self.logs, self.pids):
            folder.mkdir(parents=True, exist_ok=True)

    def about(self) -> dict[str, Any]:
        """The content of `about_file`; empty when no cluster ever ran here."""
        try:
            content = json.loads(self.about_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def running(self) -> bool:
        """Whether a `layercast up` or `layercast demo` holds this folder now."""
        try:
            with self.lock_file.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keeps other clusters off this folder; raises ClusterError when one is here already."""
        with self.lock_file.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ClusterError(
                    f"another local cluster uses {self.root}; stop it, or choose another --state-dir"
                ) from None
            yield
