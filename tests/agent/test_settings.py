"""Flags, environment, and a clear sentence for every wrong one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layercast_agent.__main__ import _flags, parse
from layercast_agent.settings import AgentSettings, SettingsError, device_slots

REQUIRED = {
    "node": "node-0",
    "listen": "10.0.0.5:7001",
    "data-listen": "10.0.0.5:7002",
    "store-dir": "/var/store",
    "run-dir": "/var/run/lc",
    "device-memory-bytes": "1000",
    "token-file": "/etc/token",
}


def flags(**changes: str) -> list[str]:
    values = {**REQUIRED, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return [f"--{name}={value}" for name, value in values.items()]


def test_every_field_has_a_flag() -> None:
    parsed = parse(
        flags(devices="cpu:2", cpu_cores="0,1", leaf="leaf-a", worker_command="python 'a b.py'"), {}
    )
    assert parsed.store_dir == Path("/var/store")
    assert parsed.cpu_cores == (0, 1)
    assert parsed.leaf == "leaf-a"
    assert parsed.worker_command == ("python", "a b.py")
    assert parsed.metrics_address is None
    parsed.check()
    known = {action.dest for action in _flags({})._actions} - {"help"}
    assert known == {field.name for field in dataclasses.fields(AgentSettings)}


def test_environment_is_the_default_and_flags_win() -> None:
    environment = {"LAYERCAST_" + name.upper().replace("-", "_"): value for name, value in REQUIRED.items()}
    environment |= {"LAYERCAST_METRICS_LISTEN": "127.0.0.1:9100", "LAYERCAST_EGRESS_BYTES_PER_S": "7"}
    parsed = parse(["--node=other", "--devices=cpu:1"], environment)
    assert (parsed.node, parsed.egress_bytes_per_s) == ("other", 7)
    assert parsed.metrics_address == ("127.0.0.1", 9100)


@pytest.mark.parametrize("missing", REQUIRED)
def test_a_missing_flag_ends_with_code_2(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([flag for flag in flags() if not flag.startswith(f"--{missing}=")], {})
    assert ended.value.code == 2
    assert f"--{missing}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"node": ""}, "--node must be a name."),
        ({"device_memory_bytes": 0}, "--device-memory-bytes must be a number of bytes above 0."),
        ({"cpu_share": 0.0}, "--cpu-share must be above 0 and at most 1."),
        ({"cpu_share": 1.5}, "--cpu-share must be above 0 and at most 1."),
        ({"egress_bytes_per_s": -1}, "--egress-bytes-per-s must be 0 (unlimited) or a number of bytes."),
        ({"log_format": "xml"}, "--log-format must be text or json."),
        ({"listen": "7001"}, "--listen must be host:port, not '7001'."),
        ({"data_listen": "h:99999"}, "--data-listen must be host:port, not 'h:99999'."),
        ({"metrics_listen": "x"}, "--metrics-listen must be host:port, not 'x'."),
        ({"listen": "0.0.0.0:7001"}, "--listen 0.0.0.0:7001: peers are told this host"),
        ({"devices": "tpu"}, "--devices must be cpu:N, cuda or cuda:0,1, not 'tpu'."),
        ({"devices": "cpu:0"}, "--devices must be cpu:N"),
        ({"run_dir": Path("/" + "x" * 120)}, "Unix sockets allow 107."),
    ],
)
def test_wrong_values_are_named(
    settings: Callable[..., AgentSettings], changes: dict[str, Any], sentence: str
) -> None:
    settings().check()
    with pytest.raises(SettingsError) as wrong:
        settings(**changes).check()
    assert sentence in str(wrong.value)


def test_cpu_devices_share_the_cores(settings: Callable[..., AgentSettings]) -> None:
    slots = device_slots(settings(devices="cpu:2", cpu_cores=(0, 1, 2, 3)))
    assert [(s.device_id, s.worker_device, s.cpu_cores, s.threads) for s in slots] == [
        ("cpu:0", "cpu:0", (0, 1), 2),
        ("cpu:1", "cpu:1", (2, 3), 2),
    ]
    assert all(slot.visible_cuda == "" for slot in slots)
    crowded = device_slots(settings(devices="cpu:3", cpu_cores=(0,)))
    assert [(s.cpu_cores, s.threads) for s in crowded] == [((0,), 1)] * 3
    assert all(slot.threads >= 1 for slot in device_slots(settings(devices="cpu:1000")))


def test_a_cuda_worker_sees_one_device(
    settings: Callable[..., AgentSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-uuid")
    slots = device_slots(settings(devices="cuda"))
    assert [(s.device_id, s.worker_device, s.visible_cuda) for s in slots] == [
        ("cuda:0", "cuda:0", "3"),
        ("cuda:1", "cuda:0", "GPU-uuid"),
    ]
    assert [s.visible_cuda for s in device_slots(settings(devices="cuda:1"))] == ["GPU-uuid"]
    for devices, sentence in (
        ("cuda:2", "has cuda:0 to cuda:1"),
        ("cuda:0,0", "each once"),
        ("cuda:x", "numbers"),
    ):
        with pytest.raises(SettingsError, match=sentence):
            settings(devices=devices).check()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SettingsError, match="no CUDA device is visible"):
        settings(devices="cuda").check()
