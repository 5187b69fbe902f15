"""API keys: their file, the comparison of hashes, limits, and what clients are told over HTTP."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest

from layercast_gateway.errors import KeyLimitError, SettingsError, UnauthorizedError, UnknownModelError
from layercast_gateway.key_ring import LOOK_EVERY_S, KeyRing, allow
from layercast_gateway.keys import ApiKey, find, parse_keys
from layercast_gateway.metrics import Metrics


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def line(name: str, key: str, limits: str = "") -> str:
    return f"{name} {digest(key)} {limits}\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("research sk-secret", "line 1: the second word must be a SHA-256"),
        ("research", "line 1: it must begin with a name"),
        (line("a", "1", "speed=9"), "limits are"),
        (line("a", "1", "concurrent=many"), "whole number"),
        (line("a", "1") + "# b\n" + line("b", "1"), "line 3: the name or the key is there twice"),
    ],
)
def test_a_wrong_line_is_named_and_its_secret_is_not(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        parse_keys(text)
    assert "sk-secret" not in str(caught.value)


def test_a_key_is_found_by_its_hash_only() -> None:
    keys = parse_keys(line("a", "sk-1", "models=x,y") + line("b", "sk-2"))
    found = find(keys, "Bearer sk-1")
    assert found is not None and found.name == "a" and found.models == {"x", "y"}
    for wrong in ("", "sk-1", "Basic sk-1", "Bearer ", "Bearer sk-3", f"Bearer {digest('sk-1')}"):
        assert find(keys, wrong) is None


class Now:
    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def ring(tmp_path: Path, text: str) -> tuple[KeyRing, Now, Path]:
    file, now = tmp_path / "keys", Now()
    file.write_text(text)
    return KeyRing(file, metrics=Metrics(), clock=now), now, file


def test_a_rate_is_held_over_time_and_says_when_to_come_back(tmp_path: Path) -> None:
    keys, now, _ = ring(tmp_path, line("a", "k", "requests_per_minute=60"))
    for _ in range(10):  # ten seconds' worth at once
        with keys.using("Bearer k"):
            pass
    with pytest.raises(KeyLimitError) as caught, keys.using("Bearer k"):
        pass
    assert (caught.value.status, caught.value.retry_after_s) == (429, 1)
    now.at += 1.0
    with keys.using("Bearer k"):
        pass


def test_so_many_requests_run_at_once_and_a_failed_one_counts_no_longer(tmp_path: Path) -> None:
    keys, _, _ = ring(tmp_path, line("a", "k", "concurrent=1"))
    with keys.using("Bearer k"), pytest.raises(KeyLimitError), keys.using("Bearer k"):
        pass
    with pytest.raises(RuntimeError), keys.using("Bearer k"):
        raise RuntimeError
    with keys.using("Bearer k"):
        pass


def test_a_replaced_file_is_in_force_soon_and_a_broken_one_is_not(tmp_path: Path) -> None:
    keys, now, file = ring(tmp_path, line("a", "old"))
    file.unlink()
    file.write_text(line("a", "new"))
    now.at += LOOK_EVERY_S
    assert keys.known("Bearer new") is not None
    with pytest.raises(UnauthorizedError):
        keys.known("Bearer old")
    file.write_text("nonsense")
    now.at += LOOK_EVERY_S
    assert keys.known("Bearer new") is not None


def test_a_file_that_cannot_be_used_at_the_start_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--api-keys-file"):
        KeyRing(tmp_path / "absent", metrics=Metrics())


def test_a_model_that_a_key_may_not_use_does_not_exist_for_it() -> None:
    key = ApiKey(name="a", digest=digest("k"), models=frozenset({"x"}))
    allow(key, "x")
    allow(None, "y")
    with pytest.raises(UnknownModelError):
        allow(key, "y")


async def test_clients_without_a_key_are_refused_in_openais_words(tmp_path: Path) -> None:
    import aiohttp

    from layercast_gateway.gateway import Gateway
    from layercast_gateway.settings import Settings

    file = tmp_path / "keys"
    file.write_text(line("a", "k"))
    gateway = Gateway(Settings(listen="127.0.0.1:0", operator="127.0.0.1:9", api_keys_file=str(file)))
    await gateway.start()
    url = f"http://{gateway.address}/v1"

    async def ask(method: str, path: str, **more: Any) -> tuple[int, Any]:
        async with session.request(method, f"{url}{path}", **more) as answer:
            return answer.status, await answer.json()

    try:
        async with aiohttp.ClientSession() as session:
            for method, path in (("GET", "/models"), ("GET", "/models/m"), ("POST", "/chat/completions")):
                status, body = await ask(method, path)
                assert status == 401 and body["error"]["code"] == "invalid_api_key", path
            header = {"Authorization": "Bearer k"}
            status, body = await ask(
                "POST", "/completions", headers=header, json={"model": "m", "prompt": "x"}
            )
            assert status != 401
            large = io.BytesIO(b"x" * (9 << 20))
            status, body = await ask("POST", "/completions", headers=header, data=large)
            assert status == 413 and body["error"]["code"] == "body_too_large"
            async with session.get(f"http://{gateway.address}/healthz") as answer:
                assert answer.status == 200, "probes need no key"
            names = [("name[]", "layercast_gateway_requests_waiting")]
            async with session.get(f"http://{gateway.address}/metrics", params=names) as answer:
                page = await answer.text()
                assert "layercast_gateway_requests_waiting" in page and "ttft" not in page
    finally:
        await gateway.stop()
