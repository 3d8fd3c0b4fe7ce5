"""The one thing of grouped experts that only a GPU can show: torch's grouped product."""

from __future__ import annotations

import pytest
import torch

from moa_megatron.grouped_linear import _has_grouped_kernel, grouped_linear
from tests.helpers.numerics import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDTH, HIDDEN = 512, 768


# Counts of no particular multiple, experts without tokens first, in between and last.
@pytest.mark.parametrize(
    "counts", [[131, 7, 1, 64], [0, 129, 0, 70], [3, 0, 0, 0], [0, 0, 0, 0]], ids=str
)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_one_product_per_expert(counts: list[int], bias: bool) -> None:
    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    torch.manual_seed(0)
    x, weights = tensor(sum(counts), WIDTH), [tensor(HIDDEN, WIDTH) for _ in counts]
    biases = [tensor(HIDDEN) for _ in counts] if bias else None
    if torch.cuda.get_device_capability()[0] >= 9:
        assert _has_grouped_kernel(x, weights[0]) == bool(sum(counts))
    output = grouped_linear(x, weights, counts, biases)
    upstream = torch.randn_like(output)
    inputs = [x, *weights, *(biases or [])]
    found = torch.autograd.grad(output, inputs, upstream)

    exact = [t.detach().double().requires_grad_() for t in inputs]
    added = exact[1 + len(counts) :] if bias else None
    expected = grouped_linear(exact[0], exact[1 : 1 + len(counts)], counts, added)
    gradients = torch.autograd.grad(expected, exact, upstream.double())
    assert_close("output", output, expected, 4e-3)
    for index, pair in enumerate(zip(found, gradients, strict=True)):
        assert_close(f"gradient of input {index}", *pair, 4e-3)
