"""Settings of a gateway: read from flags and environment once, checked, never changed afterwards."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, NoReturn

from layercast_gateway.errors import SettingsError

PORT_MAX = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a gateway is told at its start; `from_arguments` fills and checks it."""

    listen: str
    """host:port of the HTTP server; port 0 lets the system choose one."""

    operator: str
    """host:port of the operator's RouteService."""

    queue_requests_max: int = 1024
    """Requests of one model that may wait for a replica; more are answered with 429."""

    request_deadline_s: float = 300.0
    """From acceptance to the last token. A request ends with one clear error when it passes."""

    window_requests: int = 4
    """Requests without a first token that a serving replica is given at a time."""

    no_replica_wait_s: float = 30.0
    """How long a request waits while no replica serves and none is on its way; then 503."""

    accept_timeout_s: float = 10.0
    """How long a replica may take to say that it owns a request which it was given."""

    silence_s: float = 2.0
    """After a lost stream: how long a request that may have been there too stays unheard of before it is replayed."""

    lame_duck_s: float = 0.0
    """After SIGTERM: how long new requests are still taken, while readiness already says no. Proxies in front need
    a moment until they send to others; without one, 0."""

    drain_grace_s: float = 30.0
    """After that: how long requests in flight may go on."""

    body_bytes_max: int = 8 << 20
    """Largest request body; larger ones are answered with 413."""

    tls_dir: str = ""
    """Folder with ca.crt, tls.crt and tls.key, read again when they change. Empty: nothing is encrypted."""

    api_keys_file: str = ""
    """File with the hashes and limits of the API keys; read again when it changes. Empty: everybody may ask."""

    log_format: str = "text"
    """`text`, or `json` for one JSON object a line."""

    log_level: str = "info"
    """`debug`, `info`, `warning` or `error`."""

    def check(self) -> None:
        """Raises SettingsError with the first thing that is wrong."""
        split_address(self.listen, flag="--listen")
        if split_address(self.operator, flag="--operator")[1] == 0:
            raise SettingsError(f"--operator {self.operator}: the port must not be 0.")
        for name in (
            "queue_requests_max",
            "window_requests",
            "request_deadline_s",
            "accept_timeout_s",
            "silence_s",
        ):
            _at_least(self, name, least=0, above=True)
        for name in ("no_replica_wait_s", "lame_duck_s", "drain_grace_s"):
            _at_least(self, name, least=0)
        _at_least(self, "body_bytes_max", least=1024)
        _one_of(self, "log_format", ("text", "json"))
        _one_of(self, "log_level", ("debug", "info", "warning", "error"))


def flag_of(name: str) -> str:
    """The flag that sets a field."""
    return "--" + name.replace("_", "-")


def split_address(address: str, *, flag: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`; SettingsError names the flag."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > PORT_MAX:
        raise SettingsError(f"{flag} {address!r} is not host:port.")
    return host.removeprefix("[").removesuffix("]"), int(port)


def from_arguments(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings from flags and, for those not given, from LAYERCAST_<FLAG>; SettingsError when one is wrong."""
    parser = _Parser(prog="layercast-gateway", description="OpenAI-compatible gateway of Layercast.")
    for setting in fields(Settings):
        parser.add_argument(
            flag_of(setting.name), dest=setting.name, metavar=setting.name.upper(), help=_help(setting)
        )
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    values: dict[str, Any] = {}
    for setting in fields(Settings):
        variable = "LAYERCAST_" + setting.name.upper()
        text = given.get(setting.name, environment.get(variable))
        if text is not None:
            values[setting.name] = _convert(setting.name, str(setting.type), text)
    for name in ("listen", "operator"):
        if name not in values:
            raise SettingsError(f"{flag_of(name)} (or LAYERCAST_{name.upper()}) is missing.")
    settings = Settings(**values)
    settings.check()
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of the whole usage."""
        raise SettingsError(f"{message}; --help lists the flags.")


def _help(setting: Field[Any]) -> str:
    return "required" if setting.default is MISSING else f"default {setting.default}"


def _convert(name: str, kind: str, text: str) -> str | int | float:
    try:
        if kind == "int":
            return int(text)
        return float(text) if kind == "float" else text
    except ValueError as error:
        raise SettingsError(f"{flag_of(name)} {text!r} is not a number.") from error


def _at_least(settings: Settings, name: str, *, least: float, above: bool = False) -> None:
    value = getattr(settings, name)
    if not (value > least if above else value >= least):  # also refuses nan
        wanted = f"above {least}" if above else f"at least {least}"
        raise SettingsError(f"{flag_of(name)} is {value}; it must be {wanted}.")


def _one_of(settings: Settings, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(settings, name) not in allowed:
        raise SettingsError(
            f"{flag_of(name)} is {getattr(settings, name)!r}; it must be one of {', '.join(allowed)}."
        )
