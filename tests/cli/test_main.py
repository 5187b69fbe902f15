"""The command line itself: help for newcomers, exit codes, settings from flags and environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from layercast_cli import settings
from layercast_cli.__main__ import main

COMMANDS = ("up", "demo", "get", "scale", "explain", "timeline", "fetch-demo-model")


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
    assert "first steps:" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"layercast {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scale", "a", "many"], "'many' is not a whole number, 0 or more"),
        (["up", "-f", "x", "--cpu-share", "2"], "'2' is not above 0 and at most 1"),
        (["up", "-f", "x", "--agents", "0"], "'0' is not a whole number above 0"),
        (["up", "-f", "x", "--port", "70000"], "'70000' is not a port"),
        (["up"], "-f/--file"),
        (["fly"], "invalid choice"),
    ],
)
def test_wrong_flags_end_with_2_and_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1


def test_settings_come_from_flags_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERCAST_AGENTS", "5")
    monkeypatch.setenv("LAYERCAST_LINK_MBIT_PER_S", "540")
    monkeypatch.setenv("LAYERCAST_STATE_DIR", "/tmp/layercast-somewhere")
    told = settings.up_settings(settings.parser().parse_args(["up", "-f", "x.yaml"]))
    assert (told.agents, told.link_mbit_per_s, told.port) == (5, 540.0, 8080)
    assert told.state.root == Path("/tmp/layercast-somewhere")
    told = settings.up_settings(settings.parser().parse_args(["up", "-f", "x.yaml", "--agents", "2"]))
    assert told.agents == 2


def test_up_refuses_a_bad_file_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "-f", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err == f"layercast up: there is no file {tmp_path}/none.yaml\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_ends_cleanly_when_asked(tmp_path: Path, number: signal.Signals) -> None:
    # The real `up` on a cluster without processes: starting, showing and stopping are its own.
    code = f"""
import sys
import layercast_cli.local as local
from layercast_cli.__main__ import main
local.LocalCluster.__init__.__kwdefaults__["programs"] = lambda layout: ()
sys.exit(main(["up", "-f", {str(tmp_path / "a.yaml")!r}, "--state-dir", {str(tmp_path / "s")!r}, "--port", "0"]))
"""
    (tmp_path / "a.yaml").write_text(
        "apiVersion: layercast.dev/v1alpha1\nkind: ModelService\nmetadata: {name: a}\n"
        "spec: {model: {source: 'hf://org/name'}}\n"
    )
    with subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        first = up.stdout.readline()
        assert "/v1/chat/completions" in first
        while "starting" not in up.stdout.readline():
            pass
        os.kill(up.pid, number)
        assert up.stdout.read() == "stopping\n"
    assert up.returncode == 0
