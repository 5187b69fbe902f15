"""`bench/gpu.sh` runs to its JSON line without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("ceilings", "load", "model", "tokens", "scaleup")  # the kernels have tests of their own


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_small_mode(tmp_path: Path) -> None:
    ran = subprocess.run(
        [ROOT / "bench" / "gpu.sh", "--small", *PARTS],
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures["failed"] == []
    assert figures == json.loads((tmp_path / "gpu.json").read_text()) | {
        key: value for key, value in figures.items() if isinstance(value, float)
    }
    for needed in ("prefill_of_matmul", "decode_b1_of_copy", "load_of_pinned_copy", "live_0.01g_ttft_mean_s"):
        assert figures[needed] > 0, needed
