"""The process: flags, exit codes, a clean end, and what it must never import."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from layercast_operator.errors import SettingsError
from layercast_operator.modelservice import ScalePolicy
from layercast_operator.settings import Address, parse_settings

DEADLINE_S = 30


def test_flags_environment_and_defaults(tmp_path: Path) -> None:
    got = parse_settings(
        ["--local-dir", str(tmp_path), "--listen", "0.0.0.0:1234", "--policy", "stop-the-world"],
        {
            "LAYERCAST_LISTEN": "ignored:1",
            "LAYERCAST_AGENT_LOST_AFTER_S": "9",
            "LAYERCAST_LOG_FORMAT": "json",
        },
    )
    assert got.listen == Address(host="0.0.0.0", port=1234)
    assert got.policy is ScalePolicy.STOP_THE_WORLD
    assert (got.agent_lost_after_s, got.log_format, got.tick_s) == (9.0, "json", 0.2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--agent-selector", "agents"], "--agent-selector: 'agents' is not key=value,key=value"),
        (["--gateway-port", "http"], "--gateway-port 'http' is not a port"),
        (["--local-dir", "/nowhere/at/all"], "--local-dir /nowhere/at/all: there is no such folder"),
        (["--local-dir", ".", "--listen", "here"], "--listen 'here' is not host:port"),
        (["--local-dir", ".", "--listen", "h:99999"], "--listen 'h:99999' is not host:port"),
        (["--local-dir", ".", "--policy", "zigzag"], "--policy 'zigzag' must be one of live, stop-the-world"),
        (["--local-dir", ".", "--log-format", "xml"], "must be text or json"),
        (["--local-dir", ".", "--tick-s", "soon"], "--tick-s 'soon' is not a number"),
        (["--local-dir", ".", "--tick-s", "0"], "must be between"),
        (["--local-dir", ".", "--nonsense"], "--help lists the flags"),
    ],
)
def test_bad_settings_are_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(arguments, {})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def operator(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "layercast_operator", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )


@pytest.mark.processes
@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen"])
def test_a_port_in_use_is_exit_code_two_and_a_sentence(tmp_path: Path, flag: str) -> None:
    other = "--metrics-listen" if flag == "--listen" else "--listen"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = operator("--local-dir", str(tmp_path), flag, f"127.0.0.1:{port}", other, "127.0.0.1:0")
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert f"layercast-operator: {flag} 127.0.0.1:{port} cannot be used" in errors
    assert "Traceback" not in errors


@pytest.mark.processes
def test_sigterm_ends_it_cleanly(tmp_path: Path) -> None:
    process = operator(
        *("--local-dir", str(tmp_path), "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"),
        *("--log-format", "json"),
    )
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if '"message": "the operator runs"' in line:
            break
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, seen + rest
    assert '"message": "the operator ends"' in rest and "Traceback" not in seen + rest


@pytest.mark.processes
def test_the_operator_runs_without_torch_and_without_the_other_programs() -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'layercast_agent', 'layercast_gateway', 'layercast_cli'):\n"
        "    sys.modules[name] = None\n"
        "import layercast_operator.__main__\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr
