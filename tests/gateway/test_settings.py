"""Settings: flags win over the environment, and what is wrong is one sentence that names the flag."""

from __future__ import annotations

import pytest

from layercast_gateway.errors import SettingsError
from layercast_gateway.settings import from_arguments, split_address

NEEDED = ["--listen", "127.0.0.1:8080", "--operator", "127.0.0.1:7000"]


def test_flags_environment_defaults() -> None:
    environment = {"LAYERCAST_OPERATOR": "op:1", "LAYERCAST_WINDOW_REQUESTS": "7", "LAYERCAST_LISTEN": "x:1"}
    settings = from_arguments(["--listen", "[::]:0", "--request-deadline-s", "1.5"], environment)
    assert (settings.listen, settings.operator, settings.window_requests) == ("[::]:0", "op:1", 7)
    assert (settings.request_deadline_s, settings.queue_requests_max) == (1.5, 1024)
    assert from_arguments(NEEDED, {}).request_deadline_s == 300
    assert split_address("[::1]:80", flag="--x") == ("::1", 80)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--listen .*is missing"),
        (["--listen", "a:1"], "--operator .*is missing"),
        (["--listen", "nohost", *NEEDED[2:]], "--listen 'nohost' is not host:port"),
        (["--listen", "a:99999", *NEEDED[2:]], "--listen"),
        ([*NEEDED[:2], "--operator", "a:0"], "--operator a:0"),
        ([*NEEDED, "--window-requests", "x"], "--window-requests 'x' is not a number"),
        ([*NEEDED, "--window-requests", "0"], "--window-requests is 0; it must be above 0"),
        ([*NEEDED, "--request-deadline-s", "nan"], "--request-deadline-s"),
        ([*NEEDED, "--drain-grace-s", "-1"], "--drain-grace-s"),
        ([*NEEDED, "--log-format", "xml"], "--log-format is 'xml'"),
        ([*NEEDED, "--nonsense"], "--nonsense"),
    ],
)
def test_wrong_settings(arguments: list[str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        from_arguments(arguments, {})
