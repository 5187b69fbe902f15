"""The demo's model as the command line needs it: made when absent, errors as sentences, its size in bytes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

from layercast_cli.errors import CliError

FLOAT32_BYTES = 4

ALIGNMENT_BYTES_MAX = 16 << 20
"""More than a page for each segment of any model that a laptop serves."""


def ensure_model(folder: Path, *, report: Callable[[str], None]) -> Path:
    """The absolute folder of SmolLM2-135M-Instruct, made when it is not there. Raises CliError."""
    from layercast_cli import smollm2

    try:
        return smollm2.ensure(folder, report).absolute()
    except smollm2.Smollm2Error as error:
        raise CliError(str(error)) from error


def float32_bytes(folder: Path) -> int:
    """Bytes of all parameters of a Hugging Face folder in fp32, from the headers of its safetensors files."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
        shapes = (tensor["shape"] for name, tensor in header.items() if name != "__metadata__")
        total += sum(math.prod(shape) for shape in shapes) * FLOAT32_BYTES
    if total == 0:
        raise CliError(f"{folder} holds no safetensors file with parameters")
    return total


def reserve_bytes(parameter_bytes: int) -> int:
    """Memory that takes parameters of so many bytes for sure: in it, every layer begins at a border of its own."""
    return parameter_bytes + ALIGNMENT_BYTES_MAX
