"""Checkpoints from a bucket, against a server that speaks S3 (rclone's): whole, cut off, changed, rotten."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

from layercast_agent import object_store
from layercast_agent.checkpoint_files import verify
from layercast_agent.errors import CheckpointError
from layercast_agent.object_store import SUMS_FILE, ObjectSource
from layercast_agent.sources import HUB_PATTERNS, parse_source
from layercast_agent.store import Phase, Progress, Store

BUCKET = "models"
KEY, SECRET = "layercast", "a secret of the tests"
SOURCE = ObjectSource(scheme="s3", bucket=BUCKET, prefix="team/llama")


class Wire(ThreadingHTTPServer):
    """The way to the server, which counts what an object's bytes cost and can be `broken`.

    It mends one thing: this server answers ranges rightly, and calls that 200 where S3 says 206.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), WireHandler)
        self.behind = 0
        self.broken = False
        self.object_bytes = 0
        # The server reads a file without looking whether it is being replaced.
        self.one_at_a_time = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join(10)


class WireHandler(BaseHTTPRequestHandler):
    """One request, passed on with its headers as they are: they are signed."""

    server: Wire
    protocol_version = "HTTP/1.1"

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.broken:
            self.close_connection = True
            return
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=10)
        with self.server.one_at_a_time, contextlib.closing(behind):
            behind.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                behind.putheader(name, value)
            behind.endheaders(body)
            answer = behind.getresponse()
            content = answer.read()
        partial = answer.status == 200 and answer.getheader("Content-Range")
        self.send_response_only(206 if partial else answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content)
        if self.command == "GET" and "list-type" not in self.path:
            self.server.object_bytes += len(content)

    do_GET = do_HEAD = do_PUT = pass_on

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Says nothing."""


class Bucket:
    """A server with one bucket, which is a folder; `put` replaces an object."""

    def __init__(self, root: Path) -> None:
        (root / BUCKET).mkdir(parents=True)
        self.wire = Wire()
        self.url = f"http://127.0.0.1:{self.wire.server_port}"
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("rclone"), "serve", "s3", "--config", "", "--auth-key", f"{KEY},{SECRET}",
             "--addr", "127.0.0.1:0", root],
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"Starting s3 server on \[http://127\.0\.0\.1:(\d+)/", line):
                self.wire.behind = int(found.group(1))
                break
        config: Any = {"endpoint": self.url, "region": "us-east-1"}
        config |= {"access_key_id": KEY, "secret_access_key": SECRET}
        self.store = S3Store(BUCKET, config=config, client_options={"allow_http": True})

    def put(self, name: str, content: bytes) -> None:
        obstore.put(self.store, f"{SOURCE.prefix}/{name}", content, use_multipart=False)

    def put_folder(self, folder: Path) -> None:
        for path in folder.iterdir():
            self.put(path.name, path.read_bytes())

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.wire.close()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    made = Bucket(tmp_path / "buckets")
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": made.url,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "RANGE_BYTES", 4096)
    monkeypatch.setattr(object_store, "RETRIES", 0)
    yield made
    made.close()


class Stopped(Exception):
    """The test stopped a download."""


def fetched(folder: Path, *, stop_at: float = 2.0) -> list[tuple[int, int]]:
    """Downloads into `folder`; `Stopped` at a share of all bytes. Returns the progress that was told."""
    said: list[tuple[int, int]] = []

    def report(done: int, total: int) -> None:
        said.append((done, total))
        if done > stop_at * total:
            raise Stopped

    object_store.download(SOURCE, folder, patterns=HUB_PATTERNS, report=report)
    return said


def is_copy_of(folder: Path, original: Path) -> bool:
    wanted = {p.name for p in original.iterdir() if p.suffix in (".json", ".safetensors", ".jinja")}
    found = {p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name != SUMS_FILE}
    return found == wanted and all((folder / n).read_bytes() == (original / n).read_bytes() for n in wanted)


def test_a_checkpoint_of_a_bucket_is_packed_and_its_download_removed(
    bucket: Bucket, sharded: Path, tmp_path: Path
) -> None:
    (sharded / "pytorch_model.bin").write_bytes(b"pickle")
    bucket.put_folder(sharded)
    store = Store(tmp_path / "store", pvc_root=tmp_path / "pvc", chunk_bytes=4096)
    said: list[Progress] = []
    manifest = store.prepare(key="k", source=str(SOURCE), revision="", dtype="", progress=said.append)
    verify(store.folder(manifest.digest))
    local = Store(tmp_path / "other", pvc_root=tmp_path / "pvc", chunk_bytes=4096).prepare(
        key="k", source=f"file://{sharded}", revision="", dtype="", progress=lambda progress: None
    )
    assert manifest.digest == local.digest
    fetching = [p for p in said if p.phase is Phase.FETCHING]
    assert fetching[0].done_bytes == 0 and fetching[-1].done_bytes == fetching[-1].total_bytes > 0
    assert [p.done_bytes for p in fetching] == sorted(p.done_bytes for p in fetching)
    assert not list((tmp_path / "store" / "downloads").iterdir())


def test_a_download_goes_on_where_it_was_stopped(bucket: Bucket, llama: Path, tmp_path: Path) -> None:
    bucket.put_folder(llama)
    with pytest.raises(Stopped):
        fetched(tmp_path / "d", stop_at=0.5)
    (part,) = (tmp_path / "d").glob("*.part")
    held = part.stat().st_size
    assert held > 0
    bucket.wire.object_bytes = 0
    said = fetched(tmp_path / "d")
    assert is_copy_of(tmp_path / "d", llama)
    total = sum(path.stat().st_size for path in (tmp_path / "d").iterdir())
    assert said[-1] == (total, total)
    assert 0 < bucket.wire.object_bytes <= total - held
    bucket.wire.object_bytes = 0
    assert fetched(tmp_path / "d")[-1] == (total, total)
    assert not bucket.wire.object_bytes


KILLED = """
import os, sys
from pathlib import Path
from layercast_agent import object_store
object_store.RANGE_BYTES = 4096
def report(done, total):
    if done > total // 2:
        os._exit(9)
source = object_store.ObjectSource(scheme="s3", bucket=sys.argv[1], prefix=sys.argv[2])
object_store.download(source, Path(sys.argv[3]), patterns=("*.json", "*.safetensors", "*.jinja"), report=report)
"""


def test_a_killed_process_loses_nothing_that_it_had(bucket: Bucket, llama: Path, tmp_path: Path) -> None:
    bucket.put_folder(llama)
    command = [sys.executable, "-c", KILLED, BUCKET, SOURCE.prefix, str(tmp_path / "d")]
    done = subprocess.run(command, env=dict(os.environ), timeout=60, check=False)
    assert done.returncode == 9
    (part,) = (tmp_path / "d").glob("*.part")
    held = part.stat().st_size
    assert held >= 4096
    bucket.wire.broken = True
    with pytest.raises(CheckpointError, match="try again"):
        fetched(tmp_path / "d")
    assert part.stat().st_size == held
    bucket.wire.broken, bucket.wire.object_bytes = False, 0
    said = fetched(tmp_path / "d")
    assert bucket.wire.object_bytes <= said[-1][1] - held
    assert is_copy_of(tmp_path / "d", llama)


def test_an_object_that_changed_meanwhile_is_begun_anew(bucket: Bucket, llama: Path, tmp_path: Path) -> None:
    bucket.put_folder(llama)
    with pytest.raises(Stopped):
        fetched(tmp_path / "d", stop_at=0.5)
    weights = llama / "model.safetensors"
    weights.write_bytes(bytes(reversed(weights.read_bytes())))
    bucket.put(weights.name, weights.read_bytes())
    fetched(tmp_path / "d")
    assert is_copy_of(tmp_path / "d", llama)


def test_one_that_changes_under_a_download_is_said(bucket: Bucket, llama: Path, tmp_path: Path) -> None:
    bucket.put_folder(llama)

    def report(done: int, total: int) -> None:
        if done > total // 2:
            bucket.put("model.safetensors", b"other" * 20_000)

    with pytest.raises(
        CheckpointError, match=r"was changed while it was downloaded|has MD5 .* the bucket says"
    ):
        object_store.download(SOURCE, tmp_path / "d", patterns=HUB_PATTERNS, report=report)


def test_bytes_that_rot_are_found_and_fetched_anew(bucket: Bucket, llama: Path, tmp_path: Path) -> None:
    bucket.put_folder(llama)
    with pytest.raises(Stopped):
        fetched(tmp_path / "d", stop_at=0.5)
    (part,) = (tmp_path / "d").glob("*.part")
    with part.open("r+b") as file:
        file.write(b"rot")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has MD5 .* the bucket says"):
        fetched(tmp_path / "d")
    fetched(tmp_path / "d")
    assert is_copy_of(tmp_path / "d", llama)


def test_digests_that_lie_beside_are_held(bucket: Bucket, llama: Path, tmp_path: Path) -> None:
    """Objects that came in parts have no MD5 at most stores; sums in the folder go for all."""
    bucket.put_folder(llama)
    weights = (llama / "model.safetensors").read_bytes()
    good = hashlib.sha256(weights).hexdigest()
    bucket.put(SUMS_FILE, f"{good[::-1]}  model.safetensors\n".encode())
    with pytest.raises(CheckpointError, match=rf"model\.safetensors has sha256 {good}, SHA256SUMS says"):
        fetched(tmp_path / "d")
    bucket.put(SUMS_FILE, f"{good} *./model.safetensors\n".encode())
    fetched(tmp_path / "d")
    assert is_copy_of(tmp_path / "d", llama)


def test_what_is_not_there_is_said(bucket: Bucket, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing lies there; spec.model.source is wrong"):
        fetched(tmp_path / "d")
    bucket.put("pytorch_model.bin", b"pickle")
    with pytest.raises(CheckpointError, match="no safetensors weights; pickle can execute code"):
        fetched(tmp_path / "d")
    gone = ObjectSource(scheme="s3", bucket="gone", prefix="x")
    with pytest.raises(CheckpointError, match=r"no such bucket or object; spec.model.source is wrong"):
        object_store.download(gone, tmp_path / "d", patterns=HUB_PATTERNS, report=lambda done, total: None)


def test_a_wrong_secret_is_said(
    bucket: Bucket, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put_folder(llama)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a guess")
    with pytest.raises(CheckpointError, match=r"the agent's credentials may not read it \(AWS_ACCESS_KEY_ID"):
        fetched(tmp_path / "d")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_sources_in_buckets_are_understood(scheme: str) -> None:
    assert parse_source(f"{scheme}://models/team/llama/") == ObjectSource(
        scheme=scheme, bucket="models", prefix="team/llama"
    )
    for text in ("models", "UPPER/x", "models/../other", "m/x"):
        with pytest.raises(CheckpointError, match=rf"must be {scheme}://bucket/path"):
            parse_source(f"{scheme}://{text}" if text != "models" else f"{scheme}:///models")
    with pytest.raises(CheckpointError, match="a bucket, which has no revisions"):
        parse_source(f"{scheme}://models/x", "main")
