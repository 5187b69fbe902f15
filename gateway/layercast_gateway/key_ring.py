"""Holds the API keys of a file: reads it again when it changes, refuses who has none, and counts who has."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from layercast_gateway.errors import KeyLimitError, SettingsError, UnauthorizedError, UnknownModelError
from layercast_gateway.keys import ApiKey, Use, admit, find, parse_keys, release
from layercast_gateway.metrics import Metrics

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
FILE_BYTES_MAX = 1 << 20


class KeyRing:
    """Keys of one file. Without a file everybody may do everything."""

    def __init__(
        self, file: Path | None, *, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file = file
        self._metrics = metrics
        self._clock = clock
        self._keys: dict[str, ApiKey] = {}
        self._uses: dict[str, Use] = {}
        self._stamp: tuple[int, int] | None = None
        self._looked_at = -math.inf
        if file is not None:
            try:
                self._read(file)
            except (OSError, ValueError) as error:
                raise SettingsError(f"--api-keys-file {file}: {error}.") from error

    @contextlib.contextmanager
    def using(self, authorization: str) -> Iterator[ApiKey | None]:
        """Count one request of a key while it runs. Raises UnauthorizedError or KeyLimitError."""
        key = self.known(authorization)
        if key is None:
            yield None
            return
        use, wait_s = admit(key, self._uses.get(key.name), now=self._clock())
        self._uses[key.name] = use
        self._count(key.name, "limited" if wait_s else "admitted")
        if wait_s:
            raise KeyLimitError(key.name, retry_after_s=math.ceil(wait_s))
        try:
            yield key
        finally:
            self._uses[key.name] = release(self._uses[key.name])

    def known(self, authorization: str) -> ApiKey | None:
        """The key, None where none is needed. Raises UnauthorizedError."""
        if self._file is None:
            return None
        self._look(self._file)
        key = find(self._keys, authorization)
        if key is None:
            self._count("unknown", "refused")
            raise UnauthorizedError(given=bool(authorization))
        return key

    def _count(self, key: str, outcome: str) -> None:
        self._metrics.key_requests.labels(key=key, outcome=outcome).inc()

    def _look(self, file: Path) -> None:
        """Take over a file that was replaced; one that cannot be used leaves the old keys in force."""
        now = self._clock()
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        try:
            self._read(file)
        except (OSError, ValueError) as error:
            log.warning("the file of API keys cannot be used", extra={"problem": str(error)})

    def _read(self, file: Path) -> None:
        seen = file.stat()
        stamp = (seen.st_mtime_ns, seen.st_ino)
        if stamp == self._stamp:
            return
        with file.open(encoding="utf-8") as opened:
            text = opened.read(FILE_BYTES_MAX)
        self._keys = parse_keys(text)
        self._stamp = stamp
        names = {key.name for key in self._keys.values()}
        self._uses = {name: use for name, use in self._uses.items() if name in names}
        log.info("API keys are known", extra={"count": len(self._keys)})


def allow(key: ApiKey | None, model: str) -> None:
    """Raises UnknownModelError for a model that a key may not use: it need not know that it exists."""
    if key is not None and key.models and model not in key.models:
        raise UnknownModelError(model)
