"""The kubectl plug-in: views of objects that a small kubectl on the path tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from layercast_cli import kubectl
from layercast_cli.__main__ import main as layercast

STATUS: dict[str, Any] = {
    "counts": {"desired": 2, "serving": 1, "loading": 1, "draining": 0},
    "conditions": [],
    "replicas": [],
    "decision": {
        "replicas": 2,
        "rule": "queue",
        "reason": "900 prompt tokens wait",
        "numbers": {"promptTokensWaiting": 900.0},
        "alternatives": ["1 replica: 0.9 s of prompts wait for each"],
    },
    "lastScale": {
        "decidedAt": "2026-11-26T06:00:00.000Z",
        "from": 1,
        "to": 2,
        "reason": "900 prompt tokens wait",
        "rule": "queue",
        "policy": "live",
        "replicas": [{"replicaId": "m-1", "node": "n1", "completeAt": "2026-11-26T06:00:02.000Z"}],
    },
}
ITEM = {
    "kind": "ModelService",
    "metadata": {"name": "m", "creationTimestamp": "2026-11-26T05:00:00Z"},
    "spec": {"replicas": 2},
    "status": STATUS,
}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl that notes how it was called and tells one object, or fails for another name."""
    script = tmp_path / "kubectl"
    note = tmp_path / "asked"
    (tmp_path / "item").write_text(json.dumps(ITEM))
    (tmp_path / "list").write_text(json.dumps({"kind": "List", "items": [ITEM]}))
    script.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / 'asked').write_text(' '.join(sys.argv[1:]))\n"
        "if 'absent' in sys.argv: sys.exit('Error from server (NotFound): absent')\n"
        "print((here / ('item' if 'm' in sys.argv else 'list')).read_text())\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return note


def test_explain_says_the_numbers_the_rule_and_the_alternatives(
    asked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kubectl.main(["explain", "m", "-n", "models", "--context", "lab"]) == 0
    text = capsys.readouterr().out
    for part in ("1 of 2", "rule queue", "promptTokensWaiting 900", "Or 1 replica: 0.9 s", "m-1 on n1"):
        assert part in text
    assert asked.read_text() == "get modelservices.layercast.dev m -o json -n models --context lab"


@pytest.mark.parametrize(
    "flags", [("-n", "models"), ("--context", "lab"), ("--request-timeout", "5s", "-n", "models")]
)
def test_the_name_may_stand_behind_flags(
    asked: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    assert kubectl.main(["explain", *flags, "m"]) == 0
    assert "1 of 2" in capsys.readouterr().out
    words = asked.read_text().split()
    assert words[:5] == ["get", "modelservices.layercast.dev", "m", "-o", "json"]
    assert sorted(words[5:]) == sorted(flags)


def test_a_reader_may_leave_before_the_end(asked: Path) -> None:
    """As `head` does; nothing is said of it."""
    code = "import sys; from layercast_cli.kubectl import main; sys.exit(main(['explain', 'm']))"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as stdout:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_timeline_and_get(asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kubectl.main(["timeline", "msvc/m"]) == 0
    assert "1 → 2 replicas" in capsys.readouterr().out
    assert kubectl.main(["get"]) == 0
    assert "m " in capsys.readouterr().out


def test_layercast_itself_follows_a_name_with_a_kind(asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert layercast(["explain", "msvc/m"]) == 0
    assert "rule queue" in capsys.readouterr().out


def test_what_kubectl_says_is_passed_on(asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kubectl.main(["explain", "absent"]) != 0
    assert "NotFound" in capsys.readouterr().err
