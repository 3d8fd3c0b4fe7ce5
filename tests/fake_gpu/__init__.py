"""A host that poses as one GPU with Transformer Engine, so that what needs both can be tested.

A process of this environment has a CUDA device that is the CPU; Transformer Engine's Python runs
as it is, around kernels in plain PyTorch. It shows that the pieces fit and what eight bits do to
the numbers, nothing about speed, memory or the real kernels.

    variables = fake_gpu.environment()
    subprocess.run([sys.executable, ...], env={**os.environ, **variables})
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.helpers import te

SITE = Path(__file__).parent / "site"
ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """Variables under which Python's processes have the device.

    Raises:
        te.Missing: Transformer Engine cannot be had here.
    """
    variables = te.environment()
    paths = [str(SITE), str(ROOT), variables["PYTHONPATH"]]
    return {**variables, "PYTHONPATH": os.pathsep.join(paths), "NVTE_TORCH_COMPILE": "0"}
