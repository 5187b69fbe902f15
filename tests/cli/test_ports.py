"""Ports for processes that are yet to start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from layercast_cli import ports
from layercast_cli.errors import UsageError
from layercast_cli.ports import check_free, free_ports

HOST = "127.0.0.1"


def test_free_ports_are_held_until_the_end_and_free_then() -> None:
    with free_ports(HOST, 5) as first, free_ports(HOST, 5) as second:
        assert len({*first, *second}) == 10
        for port in (*first, *second):
            with socket.socket() as other, pytest.raises(OSError):
                other.bind((HOST, port))
    for port in first:
        check_free(HOST, port)


def test_no_connection_is_given_one_of_them_before_somebody_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "range"
    monkeypatch.setattr(ports, "GIVEN_BY_THE_KERNEL", told)
    told.write_text("20000\t60999\n")
    with free_ports(HOST, 20) as found:
        assert all(ports.LOWEST <= port < 20000 for port in found)


def test_nobody_else_is_given_one_of_them_before_somebody_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ports, "TRIES", 12)
    monkeypatch.setattr(ports, "HIGHEST", ports.LOWEST + 11)
    with free_ports(HOST, 8) as first:
        pass
    ask = "from layercast_cli import ports\nports.HIGHEST = ports.LOWEST + 11\n"
    ask += f"with ports.free_ports({HOST!r}, 8) as found: print(*found)"
    said = subprocess.run(
        [sys.executable, "-c", ask],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    second = {int(port) for port in said.stdout.split()}
    assert len(second) == 8 and not second & set(first)


@pytest.mark.parametrize("text", ["1024 60999", "", "nothing"])
def test_where_the_kernel_gives_all_ports_it_is_asked_for_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    told = tmp_path / "range"
    monkeypatch.setattr(ports, "GIVEN_BY_THE_KERNEL", told)
    told.write_text(text)
    with free_ports(HOST, 3) as found:
        assert len(set(found)) == 3


def test_a_port_that_is_listened_on_is_refused_by_its_number() -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UsageError, match=str(port)):
            check_free(HOST, port)


def test_an_address_that_is_not_ours_is_told() -> None:
    with pytest.raises(OSError), free_ports("192.0.2.1", 1):
        pass
