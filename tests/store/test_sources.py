"""Sources resolve to folders, or to a sentence that says whose fault it is.

The hub is a small HTTP server on loopback that speaks what huggingface_hub asks for. The library reads its
endpoint when it is imported, so each fetch runs in a process of its own, as an agent's would.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from layercast_agent.errors import CheckpointError
from layercast_agent.sources import FolderSource, HubSource, Source, VolumeSource, fetch, parse_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "revision", "source"),
    [
        ("file:///models/a", "", FolderSource(folder=Path("/models/a"))),
        ("file://localhost/models/a%20b", "", FolderSource(folder=Path("/models/a b"))),
        ("pvc://claim-1/llama/8b", "", VolumeSource(claim="claim-1", path="llama/8b")),
        ("pvc://claim", "", VolumeSource(claim="claim", path="")),
        ("hf://org/name", "", HubSource(repository="org/name", revision="")),
        ("hf://org/name", "v1", HubSource(repository="org/name", revision="v1")),
        ("hf://org/name@v1", "", HubSource(repository="org/name", revision="v1")),
        ("hf://org/name@refs/pr/1", "refs/pr/1", HubSource(repository="org/name", revision="refs/pr/1")),
        (
            "hf://HuggingFaceTB/SmolLM2-135M",
            "",
            HubSource(repository="HuggingFaceTB/SmolLM2-135M", revision=""),
        ),
    ],
)
def test_sources_are_understood(text: str, revision: str, source: Source) -> None:
    assert parse_source(text, revision) == source


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "none of the schemes"),
        ("/models/a", "none of the schemes"),
        ("ftp://bucket/a", "none of the schemes"),
        ("org/name", "none of the schemes"),
        ("file://models/a", "file:///absolute/path"),
        ("file://", "file:///absolute/path"),
        ("file:///a?b", "query"),
        ("file:///a%00b", "NUL"),
        ("pvc:///path", "pvc://claim/path"),
        ("pvc://../etc", "pvc://claim/path"),
        ("pvc://claim/../../etc", "leaves its volume"),
        ("pvc://claim/a/%2e%2e/%2e%2e/etc", "leaves its volume"),
        ("hf://name", "hf://organisation/name"),
        ("hf://a/b/c", "hf://organisation/name"),
        ("hf://../x", "hf://organisation/name"),
        ("hf://org/..", "hf://organisation/name"),
        ("hf://org/na me", "hf://organisation/name"),
        ("http://[", "not a URL"),
    ],
)
def test_nonsense_is_refused_at_once(text: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        parse_source(text)


def test_two_revisions_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"revision v1, spec\.model\.revision v2"):
        parse_source("hf://org/name@v1", "v2")


def local(source: Source, root: Path) -> Path:
    return fetch(source, report=lambda done, total: None, pvc_root=root)


def test_local_folders_are_found(tmp_path: Path) -> None:
    (tmp_path / "claim" / "llama").mkdir(parents=True)
    assert local(FolderSource(folder=tmp_path), tmp_path) == tmp_path
    assert local(VolumeSource(claim="claim", path="llama"), tmp_path) == tmp_path / "claim" / "llama"
    assert local(VolumeSource(claim="claim", path=""), tmp_path) == tmp_path / "claim"


def test_missing_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "claim").mkdir()
    with pytest.raises(CheckpointError, match=r"spec\.model\.source is wrong.*gone"):
        local(FolderSource(folder=tmp_path / "gone"), tmp_path)
    with pytest.raises(CheckpointError, match="volume is not mounted"):
        local(VolumeSource(claim="other", path="x"), tmp_path)
    with pytest.raises(CheckpointError, match="pvc://claim/gone names no folder"):
        local(VolumeSource(claim="claim", path="gone"), tmp_path)


def test_a_link_does_not_leave_its_volume(tmp_path: Path) -> None:
    (tmp_path / "claim").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "claim" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leaves its volume"):
        local(VolumeSource(claim="claim", path="link"), tmp_path)


class Hub(ThreadingHTTPServer):
    """Serves the files of one folder as org/tiny; other names answer as the real hub does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.sent: list[str] = []


class HubHandler(BaseHTTPRequestHandler):
    """The four routes that snapshot_download uses."""

    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        faults = {
            "/api/models/org/gone": (404, {"X-Error-Code": "RepoNotFound"}),
            "/api/models/org/gated": (403, {"X-Error-Code": "GatedRepo"}),
            "/api/models/org/ill": (500, {}),
            "/api/models/org/tiny/revision/v9": (404, {"X-Error-Code": "RevisionNotFound"}),
        }
        for start, (status, headers) in faults.items():
            if path.startswith(start):
                self.reply(status, b"{}", headers, body=body)
                return
        if path.startswith("/api/models/org/") and "/tree/" in path:
            self.reply(200, json.dumps(self.tree()).encode(), {}, body=body)
        elif path.startswith("/api/models/org/"):
            self.reply(200, json.dumps({"id": "org/tiny", "sha": COMMIT}).encode(), {}, body=body)
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            self.file(path.rpartition("/")[2], body=body)
        else:
            self.reply(404, b"{}", {}, body=body)

    def tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": etag(path)}
            for path in sorted(self.server.folder.iterdir())
        ]

    def file(self, name: str, *, body: bool) -> None:
        path = self.server.folder / name
        if body:
            self.server.sent.append(name)
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT}
        self.reply(200, path.read_bytes(), headers, body=body)

    def reply(self, status: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Says nothing."""


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(llama: Path) -> Iterator[Hub]:
    (llama / "pytorch_model.bin").write_bytes(b"pickle")
    (llama / "onnx.pt").write_bytes(b"pickle")
    server = Hub(llama)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


FETCH = """
import json, sys
from pathlib import Path
from layercast_agent.errors import AgentError
from layercast_agent.sources import fetch, parse_source
said = []
try:
    folder = fetch(parse_source(sys.argv[1], sys.argv[2]), report=lambda done, total: said.append((done, total)))
except AgentError as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
else:
    print(json.dumps({"folder": str(folder), "said": said}))
"""


def run_fetch(
    endpoint: str, home: Path, source: str, revision: str = "", **environment: str
) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, "-c", FETCH, source, revision],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


def test_a_repository_is_downloaded_once_and_without_pickle(hub: Hub, llama: Path, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    first = run_fetch(endpoint, tmp_path / "home", "hf://org/tiny@main")
    folder = Path(first["folder"])
    wanted = {path.name for path in llama.iterdir() if path.suffix in (".json", ".safetensors", ".jinja")}
    assert {path.name for path in folder.iterdir()} == wanted
    assert all((folder / name).read_bytes() == (llama / name).read_bytes() for name in wanted)
    total = sum((llama / name).stat().st_size for name in wanted)
    assert first["said"][-1] == [total, total]
    sent = len(hub.sent)
    again = run_fetch(endpoint, tmp_path / "home", "hf://org/tiny@main")
    assert again["folder"] == first["folder"]
    assert len(hub.sent) == sent
    offline = run_fetch("http://127.0.0.1:1", tmp_path / "home", "hf://org/tiny@main", HF_HUB_OFFLINE="1")
    assert offline["folder"] == first["folder"]


@pytest.mark.parametrize(
    ("source", "revision", "says"),
    [
        ("hf://org/gone", "", "no such repository.*spec.model.source is wrong"),
        ("hf://org/gated", "", "gated.*HF_TOKEN"),
        ("hf://org/tiny", "v9", "hf://org/tiny@v9.*no such revision; spec.model.revision is wrong"),
        ("hf://org/ill", "", "the hub does not answer; try again"),
    ],
)
def test_it_says_whose_fault_it_is(hub: Hub, tmp_path: Path, source: str, revision: str, says: str) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    found = run_fetch(endpoint, tmp_path / "home", source, revision)
    assert found.get("error", "").startswith("CheckpointError: hf://org/")
    assert_matches(says, found["error"])


def test_without_a_network_it_says_try_again(tmp_path: Path) -> None:
    found = run_fetch("http://127.0.0.1:1", tmp_path / "home", "hf://org/tiny", HF_HUB_OFFLINE="1")
    assert_matches("not complete in the cache.*try again", found["error"])


def test_a_repository_of_pickle_is_refused(hub: Hub, llama: Path, tmp_path: Path) -> None:
    (llama / "model.safetensors").unlink()
    found = run_fetch(f"http://127.0.0.1:{hub.server_port}", tmp_path / "home", "hf://org/tiny")
    assert_matches("no safetensors weights; pickle", found["error"])
    assert "pytorch_model.bin" not in hub.sent


def assert_matches(pattern: str, text: str) -> None:
    position = 0
    for part in pattern.split(".*"):
        position = text.find(part, position)
        assert position >= 0, (part, text)
