"""What the cluster tests do to a cluster: helm, kubectl, requests through the gateway's Service, and disasters.

Any cluster will do whose nodes have the images and answer on NodePorts from here. Killing nodes and the API server
needs the script of a test cluster made of processes, whose path is in LAYERCAST_TEST_LAB.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import openai
from kubernetes import client, config
from tests.cluster.scraping import Prometheus, prometheus

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

    def disagreeing(self) -> dict[str, set[str]]:
        """Prompts that were answered in more than one way."""
        texts: dict[str, set[str]] = {}
        for answer in self.answers:
            texts.setdefault(answer.prompt, set()).add(answer.text)
        return {prompt: found for prompt, found in texts.items() if len(found) > 1}

    def wrong(self, right: Mapping[str, str]) -> list[Answer]:
        """Requests that failed, or were answered with other tokens than `right` has."""
        return [answer for answer in self.answers if answer.error or answer.text != right[answer.prompt]]


class Bed:
    """One installation on one cluster."""

    def __init__(self, helm: str) -> None:
        self._helm = helm
        self.lab = os.environ.get("LAYERCAST_TEST_LAB", "")
        self.key = "none"
        self.flags: tuple[str, ...] = ()  # of every installation from now on
        self._notes: list[str] = []
        self._api: Any = None

    def kubectl(self, *arguments: str, given: str | None = None, deadline_s: float = 120) -> str:
        """What kubectl says in the test's namespace."""
        command = ["kubectl", "-n", NAMESPACE, *arguments]
        return _run(command, given=given, deadline_s=deadline_s)

    def helm(self, *arguments: str, deadline_s: float = 300) -> str:
        """What helm says."""
        return _run([self._helm, "-n", NAMESPACE, *arguments], deadline_s=deadline_s)

    def install(self, *flags: str, chart: Path = CHART) -> None:
        """Install or upgrade the release and wait until everything is ready."""
        command = ["upgrade", "--install", RELEASE, str(chart), "--create-namespace"]
        values = ["-f", str(Path(__file__).with_name("values.yaml"))]
        values += ["--set", f"agent.huggingFace.cacheHostPath={hub()}"]
        self.helm(*command, *values, *self.flags, *flags, "--wait", "--timeout", "280s")
        self.key = self.secret(f"{RELEASE}-layercast-api-keys")["key"].decode()

    def is_installed(self) -> bool:
        """Whether the release is there."""
        return RELEASE in json.loads(self.helm("list", "--short", "--output", "json"))

    def secret(self, name: str) -> dict[str, bytes]:
        """What a Secret holds."""
        return {key: base64.b64decode(value) for key, value in self.get("secret", name)["data"].items()}

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

    def edit(self, spec: Mapping[str, Any]) -> float:
        """As `patch`, over a connection that is open already; when the API server was asked, in unix seconds."""
        if self._api is None:
            self._api = client.CustomObjectsApi(config.new_client_from_config())
        where = ("layercast.dev", "v1alpha1", NAMESPACE, "modelservices", SERVICE)
        self._api.get_namespaced_custom_object(*where)
        asked_at = time.time()
        self._api.patch_namespaced_custom_object(*where, {"spec": spec})
        return asked_at

    def first_command_at(self, after: float) -> float:
        """When the operator first commanded an agent after a time, by its log; unix seconds."""
        found: list[float] = []

        def look() -> bool:
            lines = self.log(self.leader())
            begun = (line["time"] for line in lines if line["message"] == "a command begins")
            found[:] = [
                at for text in begun if (at := datetime.fromisoformat(text + "+00:00").timestamp()) >= after
            ]
            return bool(found)

        self.wait(look, "a command begins")
        return min(found)

    def status(self, name: str = SERVICE) -> dict[str, Any]:
        """Status of a ModelService, empty before it has one."""
        return dict(self.get("modelservice", name).get("status") or {})

    def settled(self, replicas: int) -> bool:
        """Whether so many serve, and there is no other."""
        return self.serving() == len(self.replica_ids()) == replicas

    def serving(self, name: str = SERVICE) -> int:
        """Replicas that serve."""
        return sum(replica["state"] == "Serving" for replica in self.status(name).get("replicas") or ())

    def replica_ids(self) -> set[str]:
        """All replicas, in whatever state."""
        return {replica["replicaId"] for replica in self.status().get("replicas") or ()}

    def pods(self, component: str = "") -> list[dict[str, Any]]:
        """Our pods, of one component or all."""
        labels = "app.kubernetes.io/name=layercast"
        labels += f",app.kubernetes.io/component={component}" if component else ""
        return list(self.get("pods", "-l", labels)["items"])

    def running_pods(self, component: str) -> set[str]:
        """Pods of a component whose programs have not ended: a kubelet removes the object when it has cleaned up."""
        return {
            str(pod["metadata"]["name"])
            for pod in self.pods(component)
            if any(
                "terminated" not in c["state"]
                for c in pod["status"].get("containerStatuses", [{"state": {}}])
            )
        }

    def ready_pods(self, component: str) -> set[str]:
        """Pods of a component that are ready and do not end."""
        return {
            str(pod["metadata"]["name"])
            for pod in self.pods(component)
            if "deletionTimestamp" not in pod["metadata"]
            and any(
                c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ())
            )
        }

    def pod_on(self, node: str, component: str) -> str:
        """Name of the component's pod on a node."""
        found = (p for p in self.pods(component) if p["spec"].get("nodeName") == node)
        return str(next(found)["metadata"]["name"])

    def leader(self) -> str:
        """The pod of the operator that holds the Lease; empty when none does."""
        return str(self.get("lease", f"{RELEASE}-layercast-operator")["spec"].get("holderIdentity") or "")

    def note(self, what: str, seconds: float) -> None:
        """A time to be told at the end of the run."""
        self._notes.append(f"{seconds:8.2f} s  {what}")

    def doctor(self) -> tuple[int, str]:
        """Exit code and text of `kubectl layercast doctor`."""
        command = ["kubectl", "layercast", "doctor", "-n", NAMESPACE]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where kubectl finds the plug-in
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "PATH": path},
        )
        return done.returncode, done.stdout + done.stderr

    def report(self) -> None:
        """Write the times down: `out/cluster-times.txt`."""
        (ROOT / "out").mkdir(exist_ok=True)
        (ROOT / "out" / "cluster-times.txt").write_text("\n".join(self._notes) + "\n")

    def timed(self, holds: Callable[[], bool]) -> float:
        """Seconds that it took to become true; it is asked once."""
        began = time.monotonic()
        assert holds()
        return time.monotonic() - began

    def condition(self, kind: str, name: str = SERVICE) -> tuple[str, str]:
        """Status and reason of a condition; empty before there is one."""
        for condition in self.status(name).get("conditions", ()):
            if condition["type"] == kind:
                return condition["status"], condition["reason"]
        return "", ""

    def log(self, pod: str, *, since_s: int = 60) -> list[dict[str, Any]]:
        """Lines of a pod's newest log; ours are JSON, others become a `message`."""
        lines = self.kubectl("logs", pod, f"--since={since_s}s").splitlines()
        return [json.loads(line) if line.startswith("{") else {"message": line} for line in lines]

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

    def models(self) -> set[str]:
        """Models that a gateway lists."""
        with openai.OpenAI(base_url=f"{self.url()}/v1", api_key=self.key, timeout=30) as asking:
            return {model.id for model in asking.models.list()}

    def ask(self, prompt: str, *, model: str = SERVICE, max_tokens: int = 12, url: str = "") -> str:
        """One answer, greedy, streamed."""
        with openai.OpenAI(
            base_url=f"{url or self.url()}/v1", api_key=self.key, max_retries=0, timeout=120
        ) as asking:
            chunks = asking.completions.create(
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
        """A Prometheus that scrapes everything of ours, and is asked by the operator."""
        with prometheus(reached_from=self.pods("agent")[0]["status"]["podIP"]) as running:
            self.install(f"--set=operator.prometheusUrl={running.url}")
            self.scraped_by(running)
            running.start()
            yield running
        self.install()

    def scraped_by(self, running: Prometheus) -> None:
        """Tell it where our pods are now."""
        ports = {"operator": 7090, "gateway": 8080, "agent": 7190}
        self.wait(
            lambda: all("podIP" in pod["status"] for job in ports for pod in self.pods(job)),
            "every pod has an address",
        )
        running.scrape(
            {
                job: [f"{pod['status']['podIP']}:{port}" for pod in self.pods(job)]
                for job, port in ports.items()
            }
        )

    def in_lab(self, *arguments: str) -> str:
        """The script of the test cluster."""
        return _run([self.lab, *arguments], deadline_s=120)

    def kill_api_server(self) -> None:
        """SIGKILL, as a power cut would."""
        pid = int(Path(os.environ["K8S_STATE"], "run", "apiserver.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)


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
