"""Builds the three images without Docker and without a registry: this machine's Python, the distributions that
`.venv` holds (the tested set) and the sources, as OCI archives that `ctr`, `podman` and `docker` can load.

`images/Dockerfile` is how a release is built; this is how tests and developers get the same contents onto a cluster
that has no registry. Layers are packed by the `zstd` program when there is one, because every node writes them to
its disk twice.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(str(metadata.distribution("packaging").locate_file("")))
PYTHON_DIR = f"python{sys.version_info.major}.{sys.version_info.minor}"
IMAGE_SITE = f"usr/local/lib/{PYTHON_DIR}/site-packages"
LIB_DIR = "usr/lib/x86_64-linux-gnu"
USER_ID = 65532

PACKAGES = {
    "operator": ("operator/layercast_operator", "proto/gen/layercast"),
    "gateway": ("gateway/layercast_gateway", "proto/gen/layercast"),
    "agent": ("node_agent/layercast_agent", "proto/gen/layercast"),
}

# Not needed at run time: torch's C++ headers, tests and build programs are 200 MB.
LEFT_OUT = ("torch/include/", "torch/test/", "torch/bin/protoc", "torch/bin/test_")
# Thousands of small classes of which the operator uses none: what they cost at its start is worth 30 MB.
NOT_COMPILED = ("kubernetes/client/", "kubernetes/aio/client/models/")
STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idlelib", "turtledemo", "tkinter", "site-packages", "ensurepip"}
)

# What wheels expect of every Linux (manylinux), besides what Python itself is linked with.
LIBRARIES = ("libstdc++.so.6", "libgcc_s.so.1", "librt.so.1", "libdl.so.2", "libpthread.so.0", "libutil.so.1",
             "libresolv.so.2", "libnss_files.so.2", "libnss_dns.so.2")  # fmt: skip
LOADER = "/lib64/ld-linux-x86-64.so.2"

PASSWD = f"root:x:0:0:root:/:/bin/false\nlayercast:x:{USER_ID}:{USER_ID}:layercast:/tmp:/bin/false\n"
GROUP = f"root:x:0:\nlayercast:x:{USER_ID}:\n"
ENVIRONMENT = (
    "PATH=/usr/local/bin",
    "HOME=/tmp",
    "PYTHONSAFEPATH=1",
    "PYTHONUNBUFFERED=1",
    "PYTHONDONTWRITEBYTECODE=1",
    "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt",
)

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
ZSTD = shutil.which("zstd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A layer as a file of the archive, named by its digest."""

    path: Path
    digest: str
    content_digest: str
    """Of the layer before it was packed: what the image's configuration lists."""

    kind: str


class Layer:
    """One layer, written straight to a file: parents are made, everything belongs to root."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tar = tarfile.open(path, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 (see `close`)
        self._seen: set[str] = {""}

    def _new(self, name: str) -> bool:
        if name in self._seen:
            return False
        self.folder(name.rpartition("/")[0])
        self._seen.add(name)
        return True

    def folder(self, name: str, mode: int = 0o755) -> None:
        """A folder."""
        if self._new(name):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            self._tar.addfile(entry)

    def file(self, name: str, source: Path) -> None:
        """A copy of a file. Its time is kept, because compiled Python refers to it."""
        if self._new(name):
            seen = source.stat()
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = seen.st_size, int(seen.st_mtime)
            entry.mode = 0o755 if seen.st_mode & 0o100 else 0o644
            with source.open("rb") as content:
                self._tar.addfile(entry, content)

    def text(self, name: str, content: str) -> None:
        """A small file that this module writes."""
        if self._new(name):
            data = content.encode()
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            self._tar.addfile(entry, io.BytesIO(data))

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        if self._new(name):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, target, 0o777
            self._tar.addfile(entry)

    def close(self) -> Blob:
        """Ends the layer and packs it."""
        self._tar.close()
        digest = _digest(self._path)
        if ZSTD is None:
            return Blob(path=self._path, digest=digest, content_digest=digest, kind=LAYER_TYPE)
        packed = self._path.with_suffix(".tar.zst")
        command = [ZSTD, "-q", "-f", "-3", "-T0", "--rm", str(self._path), "-o", str(packed)]
        subprocess.run(command, check=True)
        return Blob(path=packed, digest=_digest(packed), content_digest=digest, kind=f"{LAYER_TYPE}+zstd")


def _digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def closure(extra: str, site: Path = SITE) -> tuple[metadata.Distribution, ...]:
    """Every installed distribution that `layercast[extra]` needs, the project itself left out, by name."""
    installed = {canonicalize_name(d.name): d for d in metadata.distributions(path=[str(site)])}
    seen: set[tuple[str, str]] = set()
    todo = [("layercast", extra)]
    while todo:
        name, option = todo.pop()
        if (name, option) in seen:
            continue
        seen.add((name, option))
        wanted = [Requirement(line) for line in installed[canonicalize_name(name)].requires or ()]
        for requirement in wanted:
            if requirement.marker is None or requirement.marker.evaluate({"extra": option}):
                todo += [(canonicalize_name(requirement.name), o) for o in ("", *requirement.extras)]
    names = {name for name, _ in seen} - {"layercast"}
    return tuple(installed[canonicalize_name(name)] for name in sorted(names))


def files_of(distribution: metadata.Distribution) -> Iterator[tuple[str, Path]]:
    """Path below site-packages, and the file, of everything that a distribution brings into an image.

    Compiled Python with it: nothing can be written at a container's start.
    """
    for file in distribution.files or ():
        name = str(file)
        if name.startswith(("..", "/", *LEFT_OUT)) or (
            name.endswith(".pyc") and name.startswith(NOT_COMPILED)
        ):
            continue
        source = Path(str(file.locate()))
        if source.is_file():
            yield name, source


def python_layer(path: Path) -> Blob:
    """The interpreter, its library and what both are linked with; a user that is not root."""
    layer = Layer(path)
    for name, target in (("lib", "usr/lib"), ("lib64", "usr/lib64"), ("bin", "usr/bin")):
        layer.folder(target)
        layer.link(name, target)
    interpreter = Path(sys.base_prefix, "bin", PYTHON_DIR).resolve()
    library = Path(sys.base_prefix, "lib", PYTHON_DIR)
    layer.file(f"usr/local/bin/{PYTHON_DIR}", interpreter)
    layer.link("usr/local/bin/python3", PYTHON_DIR)
    for file in sorted(p for p in library.rglob("*") if p.is_file()):
        inside = file.relative_to(library)
        if not STDLIB_LEFT_OUT & set(inside.parts) and file.suffix != ".a":
            layer.file(f"usr/local/lib/{PYTHON_DIR}/{inside}", file)
    linked = [interpreter, *sorted((library / "lib-dynload").glob("*.so"))]
    for found in sorted(_linked_with(linked) | _known_libraries()):
        layer.file(f"{LIB_DIR}/{found.name}", found)
    layer.file(LOADER.replace("/lib64", "usr/lib64"), Path(LOADER))
    layer.text("etc/passwd", PASSWD)
    layer.text("etc/group", GROUP)
    layer.text("etc/nsswitch.conf", "hosts: files dns\n")
    layer.file("etc/ssl/certs/ca-certificates.crt", Path("/etc/ssl/certs/ca-certificates.crt"))
    layer.folder("tmp", 0o1777)
    return layer.close()


def _linked_with(programs: Sequence[Path]) -> set[Path]:
    said = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=False).stdout
    paths = (
        word for line in said.splitlines() for word in line.split() if word.startswith("/") and ".so" in word
    )
    # `PROGRAM:` heads each part of the output.
    return {Path(path) for path in paths if not path.endswith(":") and path != LOADER}


def _known_libraries() -> set[Path]:
    said = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in said.splitlines() if "x86-64" in line]
    return {Path(words[-1]) for words in lines if words[0] in LIBRARIES}


def libraries_layer(path: Path, component: str) -> Blob:
    """What the component depends on."""
    layer = Layer(path)
    for distribution in closure(component):
        for name, source in files_of(distribution):
            layer.file(f"{IMAGE_SITE}/{name}", source)
    return layer.close()


def source_layer(path: Path, component: str) -> Blob:
    """Our own packages."""
    layer = Layer(path)
    for package in PACKAGES[component]:
        folder = ROOT / package
        for file in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
            layer.file(f"{IMAGE_SITE}/{folder.name}/{file.relative_to(folder)}", file)
    return layer.close()


def build(component: str, *, python: Blob, out: Path, name: str) -> Path:
    """Writes `out`/<component>.tar, an OCI archive of the image `name` on top of the layer `python`."""
    scratch = python.path.parent
    layers = [
        python,
        libraries_layer(scratch / f"{component}-libraries.tar", component),
        source_layer(scratch / f"{component}-source.tar", component),
    ]
    config: dict[str, Any] = {
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "User": f"{USER_ID}:{USER_ID}",
            "Env": list(ENVIRONMENT),
            "WorkingDir": "/tmp",
            "Entrypoint": ["/usr/local/bin/python3", "-m", f"layercast_{component}"],
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{blob.content_digest}" for blob in layers]},
    }
    archive = out / f"{component}.tar"
    _write_archive(archive, name=name, layers=layers, config=json.dumps(config, sort_keys=True).encode())
    return archive


def _write_archive(archive: Path, *, name: str, layers: Sequence[Blob], config: bytes) -> None:
    def described(kind: str, data: bytes) -> dict[str, Any]:
        return {"mediaType": kind, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}

    manifest = json.dumps({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": described(CONFIG_TYPE, config),
        "layers": [
            {"mediaType": b.kind, "digest": f"sha256:{b.digest}", "size": b.path.stat().st_size} for b in layers
        ],
    }).encode()  # fmt: skip
    annotations = {
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name.rpartition(":")[2],
    }
    entry = {**described(MANIFEST_TYPE, manifest), "annotations": annotations}
    index = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    unfinished = archive.with_suffix(".part")
    with tarfile.open(unfinished, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path, data in (
            ("oci-layout", b'{"imageLayoutVersion": "1.0.0"}'),
            ("index.json", index),
            *((f"blobs/sha256/{hashlib.sha256(data).hexdigest()}", data) for data in (config, manifest)),
        ):
            head = tarfile.TarInfo(path)
            head.size = len(data)
            tar.addfile(head, io.BytesIO(data))
        for blob in layers:
            head = tarfile.TarInfo(f"blobs/sha256/{blob.digest}")
            head.size = blob.path.stat().st_size
            with blob.path.open("rb") as content:
                tar.addfile(head, content)
    unfinished.replace(archive)


def main() -> int:
    """Builds, and loads when a loader is given; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("components", nargs="*", default=sorted(PACKAGES), help="operator, gateway, agent")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "images", help="folder of the archives")
    parser.add_argument("--prefix", default="layercast.local", help="registry part of the names")
    parser.add_argument("--tag", default="dev")
    parser.add_argument(
        "--loader",
        default=os.environ.get("LAYERCAST_IMAGE_LOADER", ""),
        help="command that gets an archive onto every node, e.g. `ctr -n k8s.io images import`; the path is appended",
    )
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    loads = []
    # Nodes unpack one image while the next one is packed.
    with tempfile.TemporaryDirectory(dir=flags.out) as scratch, ThreadPoolExecutor(1) as loading:
        python = python_layer(Path(scratch, "python.tar"))
        for component in flags.components:
            name = f"{flags.prefix}/layercast-{component}:{flags.tag}"
            archive = build(component, python=python, out=flags.out, name=name)
            sys.stdout.write(f"{name}  {archive}  {archive.stat().st_size / 1e6:.0f} MB\n")
            if flags.loader:
                command = [*shlex.split(flags.loader), str(archive)]
                loads.append(loading.submit(subprocess.run, command, check=True, stdout=subprocess.DEVNULL))
    for each in loads:
        each.result()
    return 0


if __name__ == "__main__":
    sys.exit(main())
