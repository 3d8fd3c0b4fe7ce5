"""Runs a Python program on a host that poses as a GPU: see tests/fake_gpu/__init__.py."""

from __future__ import annotations

import os
import sys

from tests.helpers import te

if __name__ == "__main__":
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        sys.exit("usage: python -m tests.fake_gpu PROGRAM [ARGUMENT...], as after python")
    try:
        variables = te.fake_gpu_environment()
    except te.Missing as missing:
        sys.exit(f"Transformer Engine on a CPU needs {missing}")
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], {**os.environ, **variables})
