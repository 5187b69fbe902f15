"""What must not work says why."""

from __future__ import annotations

import base64
import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from layercast.agent.v1alpha1 import agent_pb2, agent_pb2_grpc
from layercast.route.v1alpha1 import route_pb2, route_pb2_grpc
from tests.cluster.bed import PROMPTS, Bed

from layercast_cli.certificates import Authority

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]
WATCH = route_pb2.WatchRoutesRequest()


def service(name: str, **spec: Any) -> str:
    """A ModelService as JSON."""
    return json.dumps(
        {
            "apiVersion": "layercast.dev/v1alpha1",
            "kind": "ModelService",
            "metadata": {"name": name},
            "spec": spec,
        }
    )


def test_a_malformed_service_is_refused_by_the_api_server(bed: Bed) -> None:
    with pytest.raises(subprocess.SubprocessError, match=r"spec\.replicas"):
        bed.kubectl(
            "create",
            "--validate=false",
            "-f",
            "-",
            given=service("bad", model={"source": "hf://a/b"}, replicas=-1),
        )
    with pytest.raises(subprocess.SubprocessError, match=r"spec\.model"):
        bed.kubectl("create", "--validate=false", "-f", "-", given=service("bad"))


def test_a_path_that_leaves_its_volume_is_refused(bed: Bed) -> None:
    source = "pvc://models/../../../etc"
    text = service("escape", model={"source": source}, replicas=1)
    try:
        bed.kubectl("create", "--validate=false", "-f", "-", given=text)
    except subprocess.SubprocessError as refused:
        assert "source" in str(refused)
        return
    bed.wait(lambda: "leaves its volume" in json.dumps(bed.status("escape")), "the reason is in the status")
    bed.kubectl("delete", "modelservice", "escape")


def test_a_call_without_a_key_is_refused(served: Bed) -> None:
    for key, reason in (("", "An API key is needed"), ("wrong", "This API key is not known")):
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        for path, body in (("/v1/models", None), ("/v1/completions", b'{"model": "smollm2", "prompt": "x"}')):
            asked = urllib.request.Request(served.url() + path, data=body, headers=headers)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(asked, timeout=30)
            assert refused.value.code == 401
            error = json.load(refused.value)["error"]
            assert (error["code"], reason in error["message"]) == ("invalid_api_key", True)


def refusal(address: str, credentials: grpc.ChannelCredentials | None, *, role: str) -> grpc.RpcError:
    """How a process refuses to tell routes, or its status."""
    options = [("grpc.ssl_target_name_override", f"{role}.layercast.internal")]
    opened = grpc.insecure_channel(address)
    if credentials is not None:
        opened = grpc.secure_channel(address, credentials, options=options)
    with opened as channel, pytest.raises(grpc.RpcError) as refused:
        if role == "operator":
            next(iter(route_pb2_grpc.RouteServiceStub(channel).WatchRoutes(WATCH, timeout=10)))
        agent_pb2_grpc.AgentServiceStub(channel).GetStatus(agent_pb2.GetStatusRequest(), timeout=10)
    return refused.value


def credentials_of(files: Mapping[str, bytes]) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(files["ca.crt"], files["tls.key"], files["tls.crt"])


def test_who_has_no_certificate_of_ours_is_refused(served: Bed, tmp_path: Path) -> None:
    """Neither the operator nor an agent talks to a stranger, or to somebody of the wrong role."""
    leader = next(pod for pod in served.pods("operator") if pod["metadata"]["name"] == served.leader())
    ready = served.ready_pods("agent")  # a pod that begins has no address yet
    agent = next(pod for pod in served.pods("agent") if pod["metadata"]["name"] in ready)
    where = {
        "operator": f"{leader['status']['podIP']}:7000",
        "agent": f"{agent['status']['podIP']}:7100",
    }
    Authority().issue("operator", tmp_path)
    foreign = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    ours = served.secret("lc-layercast-agent-tls")
    for role, address in where.items():
        assert refusal(address, None, role=role).code() is grpc.StatusCode.UNAVAILABLE
        # It trusts our authority, which is no secret; its own certificate is another's.
        stranger = credentials_of({**foreign, "ca.crt": ours["ca.crt"]})
        assert refusal(address, stranger, role=role).code() is grpc.StatusCode.UNAVAILABLE
        wrong_role = refusal(address, credentials_of(ours), role=role)
        assert wrong_role.code() is grpc.StatusCode.PERMISSION_DENIED
        assert (
            f"this service is for {'gateway' if role == 'operator' else 'operator'}.layercast.internal, not for"
            in str(wrong_role.details())
        )


def test_an_agent_of_another_authority_is_not_let_in(
    served: Bed, right: dict[str, str], tmp_path: Path
) -> None:
    """The operator says why it does not talk to it, and what it has goes on."""
    home = served.status()["replicas"][0]["node"]
    # A pod that has just been made is on no node yet.
    nodes = [pod["spec"].get("nodeName", home) for pod in served.pods("agent")]
    node = next(name for name in nodes if name != home)
    Authority().issue("agent", tmp_path)
    files = {file.name: base64.b64encode(file.read_bytes()).decode() for file in tmp_path.iterdir()}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "rogue-tls"}, "data": files}
    template = served.get("daemonset", "lc-layercast-agent")["spec"]["template"]
    template["metadata"]["name"] = "rogue"
    # Without the DaemonSet's own label, which would adopt it and end it as one too many.
    template["metadata"]["labels"]["layercast.dev/pool"] = "rogue"
    for volume in template["spec"]["volumes"]:
        if volume["name"] == "tls":
            volume["secret"]["secretName"] = "rogue-tls"
    template["spec"]["nodeName"] = node
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    try:
        for each in (secret, pod):
            served.kubectl("create", "-f", "-", given=json.dumps(each))

        def said() -> bool:
            lines = (line for line in served.log(served.leader()) if line.get("node") == node)
            return any("CERTIFICATE_VERIFY_FAILED" in line.get("problem", "") for line in lines)

        served.wait(said, "the operator's log says that the certificate is not ours")
        assert served.ask(PROMPTS[0]) == right[PROMPTS[0]]
    finally:
        served.kubectl("delete", "pod", "rogue", "--ignore-not-found", "--force", "--grace-period=0")
        served.kubectl("delete", "secret", "rogue-tls", "--ignore-not-found")
