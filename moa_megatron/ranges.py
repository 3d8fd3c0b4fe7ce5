"""The ranges of ``profiling.RANGES`` as context managers: ``with ranges.GATE: ...``.

Under nsys they are Megatron's NVTX ranges, which ``--nvtx-ranges`` turns on inside the profiled
steps. torch's own profiler shows no NVTX, so there they are ``record_function`` too. Outside of a
profile a range costs a few calls that find everything off.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.utils import nvtx_range_pop, nvtx_range_push
from torch.autograd.profiler import record_function

from moa_megatron.profiling import RANGES

_autograd: Any = torch._C._autograd  # torch says nowhere else which of its profilers runs


class Range:
    """One name; may be entered again while it is open, as a recomputed layer does.

    Args:
        name: of ``profiling.RANGES``.
        detail: what follows the name, such as a step's number.
    """

    def __init__(self, name: str, detail: str = "") -> None:
        if name not in RANGES:
            raise ValueError(f"range {name!r} has no entry in profiling.RANGES: add it there")
        self.name = f"{name} {detail}" if detail else name
        self._records: list[Any] = []

    def __enter__(self) -> None:
        nvtx_range_push(self.name)
        if _torch_profiler_records():
            self._records.append(record_function(self.name).__enter__())

    def __exit__(self, *error: Any) -> None:
        # In the order of nesting, and also on the way of an exception: Megatron leaves layers by
        # one when it captures parts of them as CUDA graphs.
        if self._records:
            self._records.pop().__exit__(*error)
        nvtx_range_pop(self.name)


def _torch_profiler_records() -> bool:
    """Whether torch.profiler runs, not ``emit_nvtx``, under which the name would come twice."""
    return bool(_autograd._profiler_enabled() and _autograd._profiler_type().name == "KINETO")


ROUTER, SHARED_EXPERTS = Range("moe.router"), Range("moe.shared_experts")
DISPATCH, ROUTED, COMBINE = Range("moe.dispatch"), Range("moe.routed"), Range("moe.combine")
EXPERTS = Range("moe.experts")
GATE, MIXTURE = Range("moa.gate"), Range("moa.mixture")
FC1, FC2 = Range("moa.fc1"), Range("moa.fc2")


def step(number: int) -> Range:
    """The range of one micro-batch's forward pass in a training step, counted as the log counts."""
    return Range("train.step", str(number))
