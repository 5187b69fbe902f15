"""A local cluster of stand-in programs: files, shares, readiness, kill and restart, clean end."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import stat
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from layercast_cli.errors import ClusterError, UsageError
from layercast_cli.local import LocalCluster, offers
from layercast_cli.programs import ClusterLayout, ClusterSettings, layercast_programs
from layercast_cli.shares import plan_cpus
from layercast_cli.supervise import Backoff, Program

STANDIN = str(Path(__file__).with_name("standin.py"))
QUICK = Backoff(first_s=0.01, max_s=0.05)
SERVICE: dict[str, Any] = {
    "apiVersion": "layercast.dev/v1alpha1",
    "kind": "ModelService",
    "metadata": {"name": "smollm2"},
    "spec": {
        "model": {"source": "hf://org/name"},
        "replicas": 1,
        "scaling": {"min": 1, "max": 3, "policy": "live"},
    },
}


def settings(state_dir: Path, **changes: Any) -> ClusterSettings:
    values: dict[str, Any] = {"state_dir": state_dir, "services": (SERVICE,), "agents": 2}
    return ClusterSettings(**(values | changes))


def standins(layout: ClusterLayout) -> tuple[Program, ...]:
    """The real names, logs and pid files, other programs."""
    parts = {
        "gateway": ("gateway", layout.gateway_listen),
        "operator": ("operator", str(layout.state.root)),
    }

    def replace(program: Program) -> Program:
        part = parts.get(program.name, ("sleep",))
        argv = (sys.executable, STANDIN, *part)
        return Program(name=program.name, argv=argv, log=program.log, pid_file=program.pid_file)

    return tuple(replace(program) for program in layercast_programs(layout))


def test_with_tls_every_process_gets_the_certificate_of_its_role(tmp_path: Path) -> None:
    folders: dict[str, str] = {}

    def programs(layout: ClusterLayout) -> tuple[Program, ...]:
        folders.update(
            {program.name: program.env["LAYERCAST_TLS_DIR"] for program in layercast_programs(layout)}
        )
        return standins(layout)

    with LocalCluster(settings(tmp_path, tls=True, agents=1), programs=programs):
        root = tmp_path / "tls"
        assert folders == {
            "operator": str(root / "operator"),
            "gateway": str(root / "gateway"),
            "node-0": str(root / "agent"),
        }
        context = ssl.create_default_context(cafile=str(root / "agent/ca.crt"))
        for role in ("operator", "gateway", "agent"):
            context.load_cert_chain(root / role / "tls.crt", root / role / "tls.key")
            assert stat.S_IMODE((root / role / "tls.key").stat().st_mode) == 0o600


def test_a_cluster_from_start_to_end(tmp_path: Path) -> None:
    cluster = LocalCluster(settings(tmp_path), programs=standins, backoff=QUICK)
    with cluster:
        status = cluster.wait_ready("smollm2", deadline_s=60)
        assert (status.serving, status.desired) == (1, 1)
        assert offers(cluster.gateway_url, "smollm2")
        pids = cluster.processes
        assert set(pids) == {"operator", "gateway", "node-0", "node-1"}
        assert (tmp_path / "pids/node-1.pid").read_text() == f"{pids['node-1']}\n"
        assert cluster.kill("gateway", signal.SIGKILL) == pids["gateway"]
        assert cluster._supervisor is not None
        assert cluster._supervisor.wait_for(lambda: cluster.restarts()["gateway"] == 1, deadline_s=20)
        # It listens on the port that it had: nobody has to be told.
        cluster.wait("smollm2", lambda _: offers(cluster.gateway_url, "smollm2"), deadline_s=60)
        with pytest.raises(ClusterError, match="there is no process node-7"):
            cluster.kill("node-7", signal.SIGKILL)
        with pytest.raises(ClusterError, match="another local cluster uses"):
            LocalCluster(settings(tmp_path), programs=standins).start()
        pids = cluster.processes
    assert not any(psutil.pid_exists(pid) for pid in pids.values())
    assert cluster.processes == {}
    assert not cluster.state.running()


def test_files_that_the_processes_read(tmp_path: Path) -> None:
    (tmp_path / "status").mkdir()
    (tmp_path / "status/old.json").write_text("{}")
    cluster = LocalCluster(settings(tmp_path, policy="stop-the-world"), programs=lambda _layout: ())
    with cluster:
        layout = cluster.layout
        assert layout is not None
        described = json.loads((tmp_path / "cluster.json").read_text())
        assert described["agents"] == {node.name: node.address for node in layout.nodes}
        assert described["gateways"] == [layout.gateway_address]
        assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
        assert len((tmp_path / "token").read_text().strip()) == 64
        document = yaml.safe_load((tmp_path / "modelservices/smollm2.yaml").read_text())
        assert document["spec"]["scaling"] == {"min": 1, "max": 3, "policy": "stop-the-world"}
        assert not (tmp_path / "status/old.json").exists()
        assert cluster.state.running()
        cluster.edit("smollm2", lambda wanted: wanted["spec"].update(replicas=2))
        assert yaml.safe_load((tmp_path / "modelservices/smollm2.yaml").read_text())["spec"]["replicas"] == 2
    assert SERVICE["spec"]["scaling"]["policy"] == "live"


@pytest.mark.parametrize("fresh", [False, True])
def test_packed_checkpoints_stay_unless_nodes_shall_be_fresh(tmp_path: Path, fresh: bool) -> None:
    packed = tmp_path / "node-1/store/digest/manifest.json"
    packed.parent.mkdir(parents=True)
    packed.write_text("{}")
    with LocalCluster(settings(tmp_path, fresh=fresh), programs=lambda _layout: ()):
        assert packed.exists() is not fresh


def test_flags_of_the_programs(tmp_path: Path) -> None:
    wanted = settings(
        tmp_path, policy="live", link_bytes_per_s=67_500_000, cpu_share=0.5, device_memory_bytes=1 << 30
    )
    seen: list[Program] = []

    def note(layout: ClusterLayout) -> tuple[Program, ...]:
        seen.extend(layercast_programs(layout))
        return ()

    with LocalCluster(wanted, programs=note) as cluster:
        layout = cluster.layout
    assert layout is not None
    by_name = {program.name: program.argv[2:] for program in seen}
    assert list(by_name) == ["node-0", "node-1", "operator", "gateway"]
    agent = flags_of(by_name["node-1"])
    assert by_name["node-1"][0] == "layercast_agent"
    assert agent["--listen"] == layout.nodes[1].address
    assert agent["--store-dir"] == f"{tmp_path}/node-1/store"
    assert (agent["--cpu-share"], agent["--egress-bytes-per-s"]) == ("0.5", "67500000")
    assert (agent["--device-memory-bytes"], agent["--token-file"]) == (str(1 << 30), f"{tmp_path}/token")
    operator, gateway = flags_of(by_name["operator"]), flags_of(by_name["gateway"])
    assert (operator["--local-dir"], operator["--policy"]) == (str(tmp_path), "live")
    assert gateway["--operator"] == operator["--listen"]
    ports = {layout.gateway_address, layout.operator_address, layout.operator_metrics_address}
    ports |= {
        port for node in layout.nodes for port in (node.address, node.data_address, node.metrics_address)
    }
    assert len(ports) == 9


def flags_of(command: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(command[1::2], command[2::2], strict=True))


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of 127.0.0.1 cannot be used"):
            LocalCluster(settings(tmp_path, port=port), programs=standins).start()
    # Nothing is held after a failed start.
    with LocalCluster(settings(tmp_path, port=port), programs=lambda _layout: ()) as cluster:
        assert cluster.gateway_url == f"http://127.0.0.1:{port}"


def test_waiting_ends_with_what_is_wrong(tmp_path: Path) -> None:
    def failing(layout: ClusterLayout) -> tuple[Program, ...]:
        argv = (sys.executable, "-S", STANDIN, "fail")
        return (Program(name="node-0", argv=argv, log=tmp_path / "logs/x", pid_file=tmp_path / "pids/x"),)

    cluster = LocalCluster(settings(tmp_path), programs=failing, backoff=QUICK)
    with (
        cluster,
        pytest.raises(ClusterError, match=r"node-0 does not stay up \(exit code 2\): port 1 is in use"),
    ):
        cluster.wait_ready("smollm2", deadline_s=30)
    cluster = LocalCluster(settings(tmp_path), programs=lambda _layout: ())
    words = "smollm2 did not reach 1 serving replicas within 0 s: the operator has written no status yet"
    with cluster, pytest.raises(ClusterError, match=words):
        cluster.wait_ready("smollm2", deadline_s=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"agents": 0}, "at least one agent"),
        ({"services": ()}, "at least one ModelService"),
        ({"cpu_share": 1.5}, "above 0 and at most 1"),
        ({"state_dir": Path("/" + "x" * 90)}, "too long for the sockets"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        LocalCluster(settings(**({"state_dir": tmp_path} | changes)))


def test_cores_are_shared_out() -> None:
    many = plan_cpus(range(8), 3)
    assert [plan.cores for plan in many] == [(0, 1), (2, 3), (4, 5)]
    assert {plan.share for plan in many} == {1.0}
    few = plan_cpus([0, 1], 3)
    assert [plan.cores for plan in few] == [(0, 1)] * 3
    assert few[0].share == pytest.approx(0.567)
    assert plan_cpus([0, 1], 1) == plan_cpus([1, 0], 1)
    assert plan_cpus([0, 1], 1)[0].share == 1.0
    assert [plan.share for plan in plan_cpus(range(8), 2, share=0.3)] == [0.3, 0.3]
