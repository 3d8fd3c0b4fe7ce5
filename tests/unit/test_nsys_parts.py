"""Parts of the nsys report alone: classes of kernels, sets of times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.nsight import intervals
from tools.nsight.classes import kernel_class


@pytest.mark.parametrize(
    ("name", "ranges", "expected"),
    [
        ("ncclDevKernel_SendRecv(x)", (), "communication: NCCL"),
        ("dispatch void deep_ep::intranode::dispatch<8>", (), "communication: dispatcher, other"),
        ("mixture_backward", ("moa.gate",), "MoA mixture kernels"),
        ("flash_fwd_kernel void cutlass::x", (), "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90", (), "attention"),
        ("Kernel2 void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm>", (), "GEMM"),
        ("nvjet_hsh", ("moa.gate",), "MoA gates"),
        ("nvjet_hsh", ("moe.router",), "router, permute"),
        ("nvjet_hsh", ("moe.routed", "moe.experts", "moa.fc1"), "GEMM"),
        ("rmsnorm_fwd_tuned_kernel", (), "norm"),
        ("permute_kernel", (), "router, permute"),
        ("multi_tensor_apply_kernel", (), "optimizer"),
        ("nvjet_hsh", ("Optimizer.step#Muon.step",), "optimizer"),
        ("par_kernel user::lambda(int)", (), "other kernels"),
        ("vectorized_elementwise_kernel", (), "elementwise"),
    ],
)
def test_kernel_classes(name: str, ranges: tuple[str, ...], expected: str) -> None:
    assert kernel_class(name, ranges) == expected


def test_names_of_our_kernels_are_those_of_the_source() -> None:
    root = Path(__file__).parents[2]
    source = (root / "moa_megatron" / "kernels" / "triton_kernels.py").read_text()
    for name in ("mixture_forward", "mixture_backward"):
        assert f"def {name}(" in source
        assert kernel_class(name, ()) == "MoA mixture kernels"


TIMES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


def covered(pieces: list[tuple[int, int]]) -> set[int]:
    return {time for start, end in pieces for time in range(start, end)}


@given(TIMES, TIMES)
def test_intervals_against_sets_of_times(first: list[Any], second: list[Any]) -> None:
    a, b = intervals.union(first), intervals.union(second)
    for joined, source in ((a, first), (b, second)):
        assert covered(joined) == covered(source)
        assert intervals.length(joined) == len(covered(source))
        assert all(x[1] < y[0] for x, y in zip(joined, joined[1:]))
    rest = intervals.difference(a, b)
    assert covered(rest) == covered(first) - covered(second)
    assert intervals.length(rest) == len(covered(rest))
    assert covered(intervals.clip(a, (10, 30))) == covered(first) & set(range(10, 30))
