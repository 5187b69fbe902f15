"""A Prometheus that runs here, beside the cluster, and can be killed."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class Prometheus:
    """One that runs here and scrapes the pods; nodes reach it at `url`."""

    url: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin, with what was scraped before."""
        command = ["prometheus", f"--config.file={self.folder}/prometheus.yml", "--log.level=warn"]
        address = self.url.removeprefix("http://")
        storage = f"--storage.tsdb.path={self.folder}/data"
        self.process = subprocess.Popen([*command, storage, f"--web.listen-address={address}"])

    def scrape(self, targets: Mapping[str, list[str]]) -> None:
        """Scrape these by job from now on."""
        found = [{"targets": each, "labels": {"job": job}} for job, each in targets.items()]
        unfinished = self.folder / "targets.part"
        unfinished.write_text(json.dumps(found))
        unfinished.replace(self.folder / "targets.json")

    def kill(self) -> None:
        """SIGKILL; nothing is left to ask."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)


@contextmanager
def prometheus(*, reached_from: str) -> Iterator[Prometheus]:
    """Debian's Prometheus; `reached_from` is an address of those that will ask it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((reached_from, 9))
        host = probe.getsockname()[0]
    with socket.create_server((host, 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        found = {"files": [f"{folder}/targets.json"], "refresh_interval": "2s"}
        jobs = [{"job_name": "layercast", "file_sd_configs": [found]}]
        config = {"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}
        Path(folder, "prometheus.yml").write_text(json.dumps(config))
        running = Prometheus(url=f"http://{host}:{port}", folder=Path(folder))
        try:
            yield running
        finally:
            running.kill()
