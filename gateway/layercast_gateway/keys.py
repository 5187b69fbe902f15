"""Who may use the API, and how much: keys that are known by their hashes only. Pure.

A file, in Kubernetes a Secret, has one line a key: a name, the SHA-256 of the key in hexadecimal, and limits:

    # name    sha256(key)            limits, all optional
    research  2bb80d53...c8af5b2     requests_per_minute=600 concurrent=32 models=smollm2,llama

`printf %s "$KEY" | sha256sum` makes the hash. Whoever reads the file can use no key of it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass

_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One key and its limits; 0 means no limit, no models means all."""

    name: str
    digest: str
    requests_per_minute: int = 0
    concurrent: int = 0
    models: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a key has left: requests that may begin at once, as of `at`, and those that run."""

    left: float
    at: float
    running: int = 0


def parse_keys(text: str) -> dict[str, ApiKey]:
    """Keys by their hashes. Raises ValueError with a sentence that names the line and never what is in it."""
    keys: dict[str, ApiKey] = {}
    names: set[str] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            key = _key(words)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if key.digest in keys or key.name in names:
            raise ValueError(f"line {number}: the name or the key is there twice")
        keys[key.digest] = key
        names.add(key.name)
    return keys


def _key(words: list[str]) -> ApiKey:
    if len(words) < 2 or not _NAME.fullmatch(words[0]):
        raise ValueError("it must begin with a name and the SHA-256 of a key")
    if not _HASH.fullmatch(words[1].lower()):
        raise ValueError("the second word must be a SHA-256 in hexadecimal, never the key itself")
    limits: dict[str, str] = {}
    for word in words[2:]:
        name, equals, value = word.partition("=")
        if not equals or name not in {"requests_per_minute", "concurrent", "models"}:
            raise ValueError("limits are requests_per_minute=N, concurrent=N and models=a,b")
        limits[name] = value
    return ApiKey(
        name=words[0],
        digest=words[1].lower(),
        requests_per_minute=_count(limits.get("requests_per_minute", "0")),
        concurrent=_count(limits.get("concurrent", "0")),
        models=frozenset(filter(None, limits.get("models", "").split(","))),
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("a limit must be a whole number")
    return int(text)


def find(keys: Mapping[str, ApiKey], authorization: str) -> ApiKey | None:
    """The key of an Authorization header; None when it is none of ours. Every known hash is compared in full."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "bearer" or not given:
        return None
    digest = hashlib.sha256(given.strip().encode()).hexdigest()
    found = None
    for known, key in keys.items():
        if hmac.compare_digest(known, digest):
            found = key
    return found


def admit(key: ApiKey, use: Use | None, *, now: float) -> tuple[Use, float]:
    """What is left after one more request, and how many seconds to wait instead; 0 lets it begin."""
    burst = max(key.requests_per_minute / 6, 1.0)  # ten seconds' worth at once
    use = use or Use(left=burst, at=now)
    left = use.left
    if key.requests_per_minute:
        left = min(burst, use.left + (now - use.at) * key.requests_per_minute / 60)
    if key.concurrent and use.running >= key.concurrent:
        return Use(left=left, at=now, running=use.running), 1.0
    if key.requests_per_minute and left < 1:
        wait_s = (1 - left) * 60 / key.requests_per_minute
        return Use(left=left, at=now, running=use.running), max(wait_s, 1.0)
    spent = left - 1 if key.requests_per_minute else left
    return Use(left=spent, at=now, running=use.running + 1), 0.0


def release(use: Use) -> Use:
    """One request of a key ended."""
    return Use(left=use.left, at=use.at, running=max(use.running - 1, 0))
