"""What is left on a disk before much is written to it."""

from __future__ import annotations

import shutil
from pathlib import Path

from layercast_agent.errors import NoCapacityError

SPARE_BYTES = 64 * 1024 * 1024  # for small files and everybody else


def require_free(folder: Path, nbytes: int, *, what: str) -> None:
    """Refuse to begin what would fill the folder's disk: NoCapacityError names `what` needs the bytes."""
    free = shutil.disk_usage(folder).free
    if free < nbytes + SPARE_BYTES:
        raise NoCapacityError(
            f"{what} needs {nbytes} bytes, {folder} has {free} free of which {SPARE_BYTES} are kept"
        )
