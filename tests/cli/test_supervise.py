"""Processes are kept running, ended in time, and leave nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from layercast_cli.errors import ClusterError
from layercast_cli.supervise import BROKEN_AFTER_FAILURES, Backoff, Program, Supervisor, last_line

STANDIN = str(Path(__file__).with_name("standin.py"))
QUICK = Backoff(first_s=0.01, max_s=0.02, healthy_s=60)
DEADLINE_S = 20.0


def program(folder: Path, name: str, *part: str) -> Program:
    argv = (sys.executable, "-S", STANDIN, *part)
    return Program(name=name, argv=argv, log=folder / f"{name}.log", pid_file=folder / f"{name}.pid")


def wait_line(log: Path, process: psutil.Process) -> None:
    """Follows the log until its first line; a file has no event, but `tail -f` has."""
    with subprocess.Popen(
        ["tail", "-n", "+1", "-F", log], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as tail:
        assert tail.stdout is not None
        assert tail.stdout.readline()
        assert process.is_running()
        tail.kill()


def test_a_killed_process_is_started_again_with_the_same_arguments(tmp_path: Path) -> None:
    supervisor = Supervisor([program(tmp_path, "a", "sleep"), program(tmp_path, "b", "sleep")], backoff=QUICK)
    supervisor.start()
    try:
        assert supervisor.wait_for(lambda: len(supervisor.pids) == 2, deadline_s=DEADLINE_S)
        before = supervisor.pids
        supervisor.send("a", signal.SIGKILL)
        assert supervisor.wait_for(lambda: supervisor.restarts("a") == 1, deadline_s=DEADLINE_S)
        after = supervisor.pids
        assert after["b"] == before["b"]
        assert after["a"] != before["a"]
        assert (tmp_path / "a.pid").read_text() == f"{after['a']}\n"
        assert set(supervisor.names) == {"a", "b"}
    finally:
        supervisor.stop()
    assert supervisor.pids == {}
    assert not any(psutil.pid_exists(pid) for pid in (*before.values(), *after.values()))
    assert not (tmp_path / "a.pid").exists()


def test_one_that_does_not_listen_is_killed_after_the_grace(tmp_path: Path) -> None:
    supervisor = Supervisor([program(tmp_path, "deaf", "sleep-deaf")])
    supervisor.start()
    assert supervisor.wait_for(lambda: "deaf" in supervisor.pids, deadline_s=DEADLINE_S)
    pid = supervisor.pids["deaf"]
    wait_line(tmp_path / "deaf.log", psutil.Process(pid))
    supervisor.stop(grace_s=0.2)
    assert not psutil.pid_exists(pid)


def test_what_a_process_leaves_behind_is_ended_too(tmp_path: Path) -> None:
    supervisor = Supervisor([program(tmp_path, "parent", "child", str(tmp_path / "child"))])
    supervisor.start()
    assert supervisor.wait_for(lambda: "parent" in supervisor.pids, deadline_s=DEADLINE_S)
    wait_line(tmp_path / "parent.log", psutil.Process(supervisor.pids["parent"]))
    child = psutil.Process(int((tmp_path / "child").read_text()))
    supervisor.stop(grace_s=5)
    psutil.wait_procs([child], timeout=DEADLINE_S)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_one_that_never_stays_up_is_told_with_its_last_words(tmp_path: Path) -> None:
    supervisor = Supervisor([program(tmp_path, "bad", "fail")], backoff=QUICK)
    supervisor.start()
    try:
        assert supervisor.broken() == ""
        assert supervisor.wait_for(lambda: bool(supervisor.broken()), deadline_s=DEADLINE_S)
        assert supervisor.restarts("bad") >= BROKEN_AFTER_FAILURES - 1
        assert supervisor.broken().startswith("bad does not stay up (exit code 2): port 1 is in use")
    finally:
        supervisor.stop()


def test_nothing_is_sent_to_a_process_that_is_not_there(tmp_path: Path) -> None:
    supervisor = Supervisor([program(tmp_path, "a", "sleep")])
    with pytest.raises(ClusterError, match="a is not running"):
        supervisor.send("a", signal.SIGTERM)
    supervisor.stop()


def test_children_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    code = f"""
import sys, threading
from pathlib import Path
from layercast_cli.supervise import Program, Supervisor
folder = Path({str(tmp_path)!r})
argv = (sys.executable, "-S", {STANDIN!r}, "sleep-deaf")
s = Supervisor([Program(name="x", argv=argv, log=folder / "x.log", pid_file=folder / "x.pid")])
s.start()
s.wait_for(lambda: "x" in s.pids, deadline_s=20)
print(s.pids["x"], flush=True)
threading.Event().wait(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        wait_line(tmp_path / "x.log", child)
        parent.kill()
    psutil.wait_procs([child], timeout=DEADLINE_S)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_back_off_doubles_up_to_its_bound() -> None:
    backoff = Backoff(first_s=0.2, max_s=1.0)
    assert [backoff.delay_s(n) for n in (1, 2, 3, 4, 99)] == [0.2, 0.4, 0.8, 1.0, 1.0]


def test_last_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(log) == "it wrote nothing"
    log.write_text("x" * 9000 + "\nlast words\n\n")
    assert last_line(log) == "last words"
