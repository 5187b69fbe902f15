"""Every kernel and the CUDA block against references: the tests of tests/gpu, on this device."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

from bench.gpu.part import Figures, Setting, main


def measure(setting: Setting) -> Figures:
    """Runs pytest without the repository's settings: the machine need not have their plugins."""
    if setting.small:
        # Without a GPU they are part of the ordinary tests, where Triton is installed.
        return {"kernel_tests": "run on a GPU"}
    # Compiling is most of it, and the cores are many.
    spread = ["-n", "8"] if importlib.util.find_spec("xdist") is not None else []
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", ".", "--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", "-q", "-ra", "--tb=short", "-W", "ignore", *spread, "tests/gpu"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    print(ran.stdout[-12000:])
    counted = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", ran.stdout)}
    figures: Figures = {
        "kernel_tests_passed": float(counted.get("passed", 0)),
        "kernel_tests_failed": float(counted.get("failed", 0) + counted.get("error", 0)),
    }
    return figures | ({"wrong": f"pytest ended with {ran.returncode}"} if ran.returncode else {})


if __name__ == "__main__":
    main(measure)
