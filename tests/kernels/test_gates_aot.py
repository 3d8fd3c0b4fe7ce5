"""Machine code of the grouped gates' kernels, compiled ahead of time: no GPU is needed or used."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton")

import torch

from moa_megatron.kernels import static, triton_gates

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

EXPERTS, WIDTH, TOKENS = 8, 1280, 4096
KERNELS = ("gate_forward", "gate_backward_input", "gate_backward_weight")


def compiled(name: str, arch: int, coefficients: int, dtype: torch.dtype) -> static.Compiled:
    """The kernel as launched for experts of the 2 B model on one rank."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weights = tensor(TOKENS, WIDTH), tensor(EXPERTS, coefficients, WIDTH)
    if name == "gate_backward_weight":
        weights = tensor(4, EXPERTS, coefficients, WIDTH, dtype=torch.float32)
    rows = tensor(TOKENS, coefficients, dtype=torch.float32)
    arguments: tuple[Any, ...] = (x, weights, rows, tensor(EXPERTS, dtype=torch.int32))
    fixed = triton_gates.compile_time(EXPERTS, WIDTH, coefficients)
    return static.compile_arguments(
        getattr(triton_gates, name),
        arguments,
        fixed,
        arch,
        bytes_stored=dtype.itemsize,
        lane_elements=1,
        options={},
    )


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("arch", "coefficients", "dtype"),
    [
        (80, 14, torch.bfloat16),
        (90, 28, torch.bfloat16),
        (90, 14, torch.float32),
        (100, 28, torch.bfloat16),
        (100, 14, torch.float16),
    ],
    ids=str,
)
def test_compiles_without_spills(
    name: str, arch: int, coefficients: int, dtype: torch.dtype
) -> None:
    kernel = compiled(name, arch, coefficients, dtype)
    print(name, arch, kernel.resources)
    assert kernel.resources["STACK"] + kernel.resources["LOCAL"] == 0
    assert "tf32" not in kernel.ptx, "float32 would lose 13 of its bits"


@pytest.mark.parametrize("arch", [80, 90])
def test_half_precision_runs_on_tensor_cores(arch: int) -> None:
    ptx = compiled("gate_forward", arch, 28, torch.bfloat16).ptx
    assert "f32.bf16.bf16" in ptx, "products of bfloat16, summed in float32"
