"""An invented step of two MoE layers, for the picture in docs/profiling.md.

    python -m tests.helpers.nsys_example docs/results/nsys-example.svg

No machine took these times: the picture shows how to read a report, not how fast anything is.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import groupby
from pathlib import Path

from tests.helpers.nsys_file import BACKWARD, NsysFile
from tools.nsight import report
from tools.nsight.page import shown_step
from tools.nsight.timeline import draw

NOTE = "synthetic: invented times, drawn by tests/helpers/nsys_example.py"
_US = 1000
_CALL = 105 * _US  # what the host takes for an operation of the forward pass
# Ranges of a layer's forward pass, each with its kernel, its time in us, and its stream.
_COMPUTE, _NETWORK = 7, 20
_LAYER = (
    (("self_attention",), "flash_fwd_kernel", 90, _COMPUTE),
    (("moe.router",), "topk_softmax_kernel", 25, _COMPUTE),
    (("moe.shared_experts", "moa.fc1"), "nvjet_hsh", 50, _COMPUTE),
    (("moe.dispatch",), "ncclDevKernel_SendRecv", 110, _NETWORK),
    (("moe.routed", "moe.experts", "moa.gate"), "nvjet_tss", 20, _COMPUTE),
    (("moe.routed", "moe.experts", "moa.fc1"), "nvjet_hsh", 140, _COMPUTE),
    (("moe.routed", "moe.experts", "moa.mixture"), "mixture_forward", 45, _COMPUTE),
    (("moe.routed", "moe.experts", "moa.fc2"), "nvjet_hsh", 80, _COMPUTE),
    (("moe.combine",), "ncclDevKernel_SendRecv", 110, _NETWORK),
)
_BACKWARD = (
    ("nvjet_hsh", 340, _COMPUTE),
    ("mixture_backward", 90, _COMPUTE),
    ("ncclDevKernel_SendRecv", 200, _NETWORK),
    ("flash_bwd_kernel", 170, _COMPUTE),
)


def example() -> NsysFile:
    """Two such steps; the first one stands for the profiler's start-up."""
    file, host, device = NsysFile(), 0, 400 * _US
    for step in (11, 12):
        begin = host
        for _ in range(2):
            for depth in range(3):
                _ranges(file, host, depth)
            for _, kernel, time, stream in _LAYER:
                launch = host + 20 * _US
                start = max(device, launch) + 4 * _US
                device = start + time * _US
                file.kernel(kernel, start, device, launch, stream)
                host += _CALL
        file.range(f"train.step {step}", begin - 5, host)
        for layer in range(2):
            for kernel, time, stream in _BACKWARD:
                # Gradients are reduced behind the next layer's backward pass.
                start = device + 4 * _US
                thread, launch = BACKWARD, host + layer
                file.kernel(kernel, start, start + time * _US, launch, stream, thread)
                overlaps = stream == _NETWORK and layer == 0
                device = start + (60 if overlaps else time) * _US
                host += 20 * _US
        host = device + 30 * _US
        file.range("Optimizer.step#AdamW.step", host, host + 60 * _US)
        file.kernel("multi_tensor_apply_kernel", host + 40 * _US, host + 160 * _US, host + 20 * _US)
        device = host + 160 * _US
        host += 70 * _US
    return file


def _ranges(file: NsysFile, host: int, depth: int) -> None:
    """One level of a layer's ranges; neighbours of one name are one range."""
    calls = enumerate(names[: depth + 1] for names, *_ in _LAYER)
    for names, group in groupby(calls, key=lambda call: call[1]):
        places = [place for place, _ in group]
        first, last = host + places[0] * _CALL, host + (places[-1] + 1) * _CALL
        if len(names) > depth:
            file.range(names[depth], first + depth, last - 2 * _US - depth)


def picture() -> str:
    """The step as the report draws it, as a file of its own."""
    with tempfile.TemporaryDirectory() as folder:
        _, ranks = report.build([example().write(Path(folder) / "example.sqlite")])
    return draw(ranks[0], shown_step(ranks[0]), NOTE) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(), encoding="utf-8")
