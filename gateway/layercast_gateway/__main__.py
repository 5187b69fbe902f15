"""Entry point of `layercast-gateway`: settings, signals and exit codes.

Exit codes: 0 after SIGTERM or SIGINT, 1 when a part of the gateway failed, 2 for wrong settings or a port in use.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys

import uvloop

from layercast_gateway import logs
from layercast_gateway.errors import SettingsError
from layercast_gateway.gateway import Gateway
from layercast_gateway.settings import Settings, from_arguments

log = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_USAGE = 2


def main() -> None:
    """Runs a gateway until a signal ends it."""
    try:
        settings = from_arguments(sys.argv[1:])
        logs.set_up(log_format=settings.log_format, level=settings.log_level)
        # Prompts are tokenised one by one: handing each to a pool of threads takes longer than it does.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        code = uvloop.run(serve(settings))
    except SettingsError as error:
        sys.stderr.write(f"layercast-gateway: {error}\n")
        code = EXIT_USAGE
    sys.exit(code)


async def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT, or until a part fails; returns the exit code."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    gateway = Gateway(settings)
    await gateway.start()
    # What was imported stays: the collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    broken = asyncio.create_task(gateway.until_broken())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((broken, stopped), return_when=asyncio.FIRST_COMPLETED)
    failed = broken.done()
    if failed:
        log.error("a part of the gateway failed", exc_info=broken.exception())
    await gateway.stop()
    await asyncio.gather(broken, return_exceptions=True)
    return EXIT_FAILED if failed else 0


if __name__ == "__main__":
    main()
