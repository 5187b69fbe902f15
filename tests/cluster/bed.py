"""What the cluster tests do to a cluster: helm, kubectl, requests through the gateway's Service, and disasters.

Any cluster will do whose nodes have the images and answer on NodePorts from here. Killing nodes and the API server
needs the script of a test cluster made of processes, whose path is in LAYERCAST_TEST_LAB.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "layercast"
NAMESPACE, RELEASE, SERVICE = "layercast-test", "lc", "smollm2"
HUB_MODEL = "models--HuggingFaceTB--SmolLM2-135M-Instruct"
LOOK_S = 0.5

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was",
    "To bake bread one needs",
    "Rain falls when",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How one request ended."""

    prompt: str
    text: str
    error: str
    began: float
    took_s: float


@dataclass(slots=True)
class Traffic:
    """Requests that go on in the background; `answers` is complete once the block is left."""

    answers: list[Answer] = field(default_factory=list)

    def failures(self) -> list[str]:
        """Errors of requests that did not end with an answer."""
        return [answer.error for answer in self.answers if answer.error]

    def wrong(self, right: Mapping[str, str]) -> list[Answer]:
        """Requests that failed, or were answered with other tokens than `right` has."""
        return [answer for answer in self.answers if answer.error or answer.text != right[answer.prompt]]


class Bed:
    """One installation on one cluster."""

    def __init__(self, helm: str) -> None:
        self._helm = helm
        self.lab = os.environ.get("LAYERCAST_TEST_LAB", "")
        self.key = "none"
        self._notes: list[str] = []

    def kubectl(self, *arguments: str, given: str | None = None, deadline_s: float = 120) -> str:
        """What kubectl says in the test's namespace."""
        command = ["kubectl", "-n", NAMESPACE, *arguments]
        return _run(command, given=given, deadline_s=deadline_s)

    def helm(self, *arguments: str, deadline_s: float = 300) -> str:
        """What helm says."""
        return _run([self._helm, "-n", NAMESPACE, *arguments], deadline_s=deadline_s)

    def install(self, *flags: str, chart: Path = CHART) -> None:
        """Install or upgrade the release and wait until everything is ready."""
        values = [
            "-f",
            str(Path(__file__).with_name("values.yaml")),
            "--set",
            f"agent.huggingFace.cacheHostPath={hub()}",
        ]
        self.helm(
            *("upgrade", "--install", RELEASE, str(chart), "--create-namespace", *values, *flags),
            *("--wait", "--timeout", "280s"),
        )

    def get(self, *what: str) -> Any:
        """Objects as kubectl tells them."""
        return json.loads(self.kubectl("get", *what, "-o", "json"))

    def uninstall(self) -> None:
        """Delete all ModelServices and the release; may be called again."""
        self.kubectl("delete", "modelservices", "--all", "--timeout=60s")
        self.helm("uninstall", RELEASE, "--wait", "--ignore-not-found")

    def patch(self, spec: Mapping[str, Any], name: str = SERVICE) -> None:
        """Change the specification of a ModelService."""
        self.kubectl("patch", "modelservice", name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def status(self, name: str = SERVICE) -> dict[str, Any]:
        """Status of a ModelService, empty before it has one."""
        return dict(self.get("modelservice", name).get("status") or {})

    def serving(self) -> int:
        """Replicas that serve."""
        return sum(replica["state"] == "Serving" for replica in self.status().get("replicas") or ())

    def replica_ids(self) -> set[str]:
        """All replicas, in whatever state."""
        return {replica["replicaId"] for replica in self.status().get("replicas") or ()}

    def pods(self, component: str = "") -> list[dict[str, Any]]:
        """Our pods, of one component or all."""
        labels = "app.kubernetes.io/name=layercast"
        labels += f",app.kubernetes.io/component={component}" if component else ""
        return list(self.get("pods", "-l", labels)["items"])

    def pod_on(self, node: str, component: str) -> str:
        """Name of the component's pod on a node."""
        found = (p for p in self.pods(component) if p["spec"].get("nodeName") == node)
        return str(next(found)["metadata"]["name"])

    def leader(self) -> str:
        """The pod of the operator that holds the Lease; empty when none does."""
        return str(self.get("lease", f"{RELEASE}-layercast-operator")["spec"].get("holderIdentity") or "")

    def note(self, what: str, seconds: float) -> None:
        """A time to be told at the end of the run."""
        self._notes.append(f"{seconds:7.1f} s  {what}")

    def report(self) -> None:
        """Write the times down: `out/cluster-times.txt`."""
        file = ROOT / "out" / "cluster-times.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(self._notes) + "\n")

    def timed(self, holds: Callable[[], bool]) -> float:
        """Seconds that it took to become true; it is asked once."""
        began = time.monotonic()
        assert holds()
        return time.monotonic() - began

    def wait(self, holds: Callable[[], Any], what: str, *, deadline_s: float = 120) -> float:
        """Seconds until `holds()`; what a cluster does can only be asked for. Fails with `what` after the deadline."""
        began = time.monotonic()
        turn = threading.Event()
        problem = ""
        while time.monotonic() - began < deadline_s:
            try:
                if holds():
                    return time.monotonic() - began
                problem = ""
            except (subprocess.SubprocessError, OSError, KeyError) as error:
                problem = str(error)
            turn.wait(LOOK_S)
        raise AssertionError(f"not within {deadline_s:.0f} s: {what} {problem}\n{self.picture()}")

    def picture(self) -> str:
        """What is there, for the message of a failed test."""
        try:
            pods = self.kubectl("get", "pods", "-o", "wide")
            return f"{pods}\n{self.kubectl('get', 'modelservices', '-o', 'wide')}"
        except subprocess.SubprocessError as error:
            return str(error)

    def url(self, without: str = "") -> str:
        """The gateway's Service, on a node that is ready, and not `without`."""
        service = self.get("service", f"{RELEASE}-layercast-gateway")
        port = service["spec"]["ports"][0]["nodePort"]
        for node in sorted(self.get("nodes")["items"], key=lambda n: str(n["metadata"]["name"])):
            ready = any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"]["conditions"])
            if ready and node["metadata"]["name"] != without:
                host = next(a["address"] for a in node["status"]["addresses"] if a["type"] == "InternalIP")
                return f"http://{host}:{port}"
        raise AssertionError("no node is ready")

    def ask(self, prompt: str, *, model: str = SERVICE, max_tokens: int = 12, url: str = "") -> str:
        """One answer, greedy, streamed."""
        with openai.OpenAI(
            base_url=f"{url or self.url()}/v1", api_key=self.key, max_retries=0, timeout=120
        ) as client:
            chunks = client.completions.create(
                model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True
            )
            return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)

    @contextmanager
    def traffic(
        self, *, clients: int = 2, max_tokens: int = 12, without: str = "", preface: int = 0
    ) -> Iterator[Traffic]:
        """Clients that ask one question after the other until the block is left, each after `preface` words."""
        traffic, stop, url = Traffic(), threading.Event(), self.url(without)

        def client(index: int) -> None:
            while not stop.is_set():
                prompt = PROMPTS[(index + len(traffic.answers)) % len(PROMPTS)]
                began, text, problem = time.monotonic(), "", ""
                try:
                    words = " ".join(f"{index}" for index in range(preface))
                    text = self.ask(f"{words}{prompt}", max_tokens=max_tokens, url=url)
                except (openai.OpenAIError, OSError) as error:
                    problem = f"{type(error).__name__}: {error}"
                took_s = time.monotonic() - began
                traffic.answers.append(
                    Answer(prompt=prompt, text=text, error=problem, began=began, took_s=took_s)
                )

        threads = [threading.Thread(target=client, args=(index,)) for index in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield traffic
        finally:
            stop.set()
            for thread in threads:
                thread.join(150)

    @contextmanager
    def prometheus(self) -> Iterator[Prometheus]:
        """A Prometheus that scrapes everything of ours."""
        ports = {"operator": 7090, "gateway": 8080, "agent": 7190}
        self.wait(
            lambda: all("podIP" in pod["status"] for job in ports for pod in self.pods(job)),
            "every pod has an address",
        )
        targets = {
            job: [f"{pod['status']['podIP']}:{port}" for pod in self.pods(job)] for job, port in ports.items()
        }
        with prometheus(targets, reached_from=targets["agent"][0].partition(":")[0]) as running:
            yield running

    def in_lab(self, *arguments: str) -> str:
        """The script of the test cluster."""
        return _run([self.lab, *arguments], deadline_s=120)

    def kill_api_server(self) -> None:
        """SIGKILL, as a power cut would."""
        pid = int(Path(os.environ["K8S_STATE"], "run", "apiserver.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)


@dataclass(slots=True)
class Prometheus:
    """One that runs here and scrapes the pods; nodes reach it at `url`."""

    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """SIGKILL; nothing is left to ask."""
        self.process.kill()
        self.process.wait(10)


@contextmanager
def prometheus(targets: Mapping[str, list[str]], *, reached_from: str) -> Iterator[Prometheus]:
    """Debian's Prometheus on `targets` by job; `reached_from` is an address of those that will ask it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((reached_from, 9))
        host = probe.getsockname()[0]
    with socket.create_server((host, 0)) as free:
        port = free.getsockname()[1]
    jobs = [{"job_name": job, "static_configs": [{"targets": found}]} for job, found in targets.items()]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "prometheus.yml")
        config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
        process = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data",
             f"--web.listen-address={host}:{port}", "--log.level=warn"],
        )  # fmt: skip
        try:
            yield Prometheus(url=f"http://{host}:{port}", process=process)
        finally:
            process.kill()
            process.wait(10)


def hub() -> Path:
    """A hub cache with the demo's model under its real name, as a node would have it after a download."""
    given = os.environ.get("LAYERCAST_TEST_HUB")
    if given:
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "layercast"
    folder = cache / "test-hub" / "hub" / HUB_MODEL
    for revision, name in (("1" * 40, "main"), ("2" * 40, "second")):
        snapshot = folder / "snapshots" / revision
        snapshot.mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(revision)
        for file in (cache / "models" / "SmolLM2-135M-Instruct").iterdir():
            if not (snapshot / file.name).exists():
                os.link(file, snapshot / file.name)
        weights = snapshot / "model.safetensors"
        if name == "second" and weights.stat().st_nlink > 1:
            _another(weights)
    return cache / "test-hub"


def _another(weights: Path) -> None:
    """A file of its own instead of the link, with the smallest change that makes another checkpoint of it."""
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1  # the last bit of a bfloat16's fraction
    weights.unlink()
    weights.write_bytes(content)


def _run(command: list[str], *, given: str | None = None, deadline_s: float) -> str:
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, timeout=deadline_s, check=False
    )
    if done.returncode:
        raise subprocess.SubprocessError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
