"""Keeps local processes running as a kubelet would: a dead one is started again with the same arguments.

One thread a process starts it, waits for its end and starts it again after a bounded back-off. The same
thread lives as long as the process may: the kernel's parent-death signal (see `tether`) follows the thread
that started a child. Nothing here knows what the processes do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from layercast_cli import tether
from layercast_cli.errors import ClusterError

# A process that ends this often in a row without ever having run for `Backoff.healthy_s` has a fault that
# restarts will not heal: a bad setting, a port in use.
BROKEN_AFTER_FAILURES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One process to keep running."""

    name: str
    argv: tuple[str, ...]
    log: Path
    pid_file: Path
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long to wait before the next start: doubled after each quick end, forgotten after a healthy run."""

    first_s: float = 0.2
    max_s: float = 5.0
    healthy_s: float = 10.0

    def delay_s(self, failures: int) -> float:
        """The wait after `failures` (1 or more) quick ends in a row."""
        return float(min(self.max_s, self.first_s * 2 ** (min(failures, 32) - 1)))


class Keeper:
    """One program, its process and the thread that owns it."""

    def __init__(self, program: Program, *, backoff: Backoff, changed: threading.Condition) -> None:
        self.program = program
        self.starts = 0
        self.failures = 0
        self.exit_code: int | None = None
        self._backoff = backoff
        self._changed = changed
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"keep-{program.name}", daemon=True)

    @property
    def pid(self) -> int | None:
        """The process id while the process runs."""
        with self._changed:
            return self._process.pid if self._process is not None else None

    @property
    def broken(self) -> bool:
        """It ended quickly again and again, and has not yet proven that it is well now."""
        with self._changed:
            runs_well = (
                self._process is not None and time.monotonic() - self._began >= self._backoff.healthy_s
            )
            return self.failures >= BROKEN_AFTER_FAILURES and not runs_well

    def start(self) -> None:
        """Starts the thread, and so the process."""
        self._thread.start()

    def send(self, number: int) -> None:
        """Sends a signal; ClusterError when the process is not running just now."""
        with self._changed:
            # The keeper thread reaps the process under no lock, but Popen never signals one that was reaped.
            if self._process is None:
                raise ClusterError(f"{self.program.name} is not running just now")
            self._process.send_signal(number)

    def ask_to_stop(self) -> None:
        """No more restarts; SIGTERM to what runs."""
        self._stopping.set()
        with self._changed:
            if self._process is not None:
                self._process.terminate()

    def join(self, *, deadline: float) -> None:
        """Waits for the process' end until `deadline` (monotonic seconds), then kills it."""
        if self._thread.ident is None:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            with self._changed:
                if self._process is not None:
                    self._process.kill()
            self._thread.join()

    def _keep(self) -> None:
        while not self._stopping.is_set():
            self._began = time.monotonic()
            process = self._spawn()
            code = process.wait() if process is not None else None
            self._note_end(code, lived_s=time.monotonic() - self._began)
            self._stopping.wait(self._backoff.delay_s(max(1, self.failures)))

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        """Starts the process; None when it is too late or impossible."""
        program = self.program
        command = [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), *program.argv]
        with self._changed:
            if self._stopping.is_set():
                return None
            program.log.parent.mkdir(parents=True, exist_ok=True)
            with program.log.open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **program.env},
                    # Ctrl-C in a terminal goes to the whole foreground group: these end in our order instead.
                    process_group=0,
                )
            program.pid_file.write_text(f"{self._process.pid}\n")
            self.starts += 1
            self._changed.notify_all()
            return self._process

    def _note_end(self, code: int | None, *, lived_s: float) -> None:
        with self._changed:
            self._process = None
            self.exit_code = code
            self.program.pid_file.unlink(missing_ok=True)
            self.failures = 1 if lived_s >= self._backoff.healthy_s else self.failures + 1
            self._changed.notify_all()


class Supervisor:
    """Keeps a set of programs running. Thread-safe."""

    def __init__(self, programs: Sequence[Program], *, backoff: Backoff | None = None) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._keepers = {
            program.name: Keeper(program, backoff=backoff or Backoff(), changed=self._changed)
            for program in programs
        }

    def start(self) -> None:
        """Starts every program."""
        for keeper in self._keepers.values():
            keeper.start()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of those that run now, by name."""
        found = {name: keeper.pid for name, keeper in self._keepers.items()}
        return {name: pid for name, pid in found.items() if pid is not None}

    @property
    def names(self) -> tuple[str, ...]:
        """All names, running or not."""
        return tuple(self._keepers)

    def restarts(self, name: str) -> int:
        """How often `name` was started again."""
        return max(0, self._keepers[name].starts - 1)

    def send(self, name: str, number: int) -> None:
        """Sends a signal to the process of `name`; ClusterError when it is not running just now."""
        self._keepers[name].send(number)

    def log(self, name: str) -> Path:
        """The log file of `name`."""
        return self._keepers[name].program.log

    def broken(self) -> str:
        """A sentence about a process that does not stay up, with its last words; empty when all is well."""
        for name, keeper in self._keepers.items():
            if keeper.broken:
                log = keeper.program.log
                how = f"{name} does not stay up (exit code {keeper.exit_code})"
                return f"{how}: {last_line(log)} (log: {log})"
        return ""

    def wait_for(self, predicate: Callable[[], bool], *, deadline_s: float) -> bool:
        """Waits until `predicate` holds, looking whenever a process starts or ends; False when time is up."""
        with self._changed:
            return self._changed.wait_for(predicate, timeout=deadline_s)

    def stop(self, *, grace_s: float = 10.0) -> None:
        """Ends all: SIGTERM, then after the grace SIGKILL; also what they started and left behind."""
        children = self._descendants()
        for keeper in self._keepers.values():
            keeper.ask_to_stop()
        deadline = time.monotonic() + grace_s
        for keeper in self._keepers.values():
            keeper.join(deadline=deadline)
        for child in children:
            # psutil compares creation times: a process id that was given anew is left alone.
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)

    def _descendants(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for pid in self.pids.values():
            try:
                found.extend(psutil.Process(pid).children(recursive=True))
            except psutil.NoSuchProcess:
                continue
        return found


def last_line(log: Path, *, tail_bytes: int = 4096) -> str:
    """The last line of a log that is not empty; a note when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - tail_bytes))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        lines = []
    spoken = [line.strip() for line in lines if line.strip()]
    return spoken[-1] if spoken else "it wrote nothing"
