"""Kernels run on the GPU where there is one, and in Triton's interpreter on a CPU elsewhere."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

# Before the first `import triton` of the process: Triton decides then.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install triton to run its kernels in the interpreter")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
