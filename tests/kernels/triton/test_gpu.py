"""What only a GPU can show of the Triton kernels: long offsets, graphs, tuning, Inductor."""

from typing import Any

import pytest
import torch

from moa_megatron.config import MoAConfig
from moa_megatron.kernels import triton_op
from moa_megatron.op import mixture
from moa_megatron.reference import mixture_reference
from tests.helpers.numerics import assert_close, assert_one_rounding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VARIANTS = ("type1", "one", "bi", "qd")


def _inputs(config: MoAConfig, rows: int, width: int, dtype: Any = torch.bfloat16) -> list[Any]:
    preact = torch.randn(rows, width * (1 + config.gated), device="cuda", dtype=dtype)
    logits = torch.randn(rows, config.num_coefficients, device="cuda")
    return [preact.requires_grad_(), logits.requires_grad_()]


def test_automatic_choice_is_triton() -> None:
    from moa_megatron.op import resolve_backend

    assert resolve_backend("auto", "cuda", torch.bfloat16) == "triton"


@pytest.mark.parametrize("width", [853, 2048, 3413, 8192])
@pytest.mark.parametrize("variant", VARIANTS)
def test_real_shapes(variant: Any, width: int) -> None:
    """Tuned launches, on as many rows as a training step has."""
    config = MoAConfig(variant=variant)
    preact, logits = _inputs(config, 4096, width)
    upstream = torch.randn(4096, width, device="cuda", dtype=torch.bfloat16)
    hidden = mixture(preact, logits, config)
    grads = torch.autograd.grad(hidden, (preact, logits), upstream)
    part = slice(0, 64)
    exact = [t.detach()[part].double().requires_grad_() for t in (preact, logits)]
    expected = mixture_reference(exact[0], exact[1], config)
    expected_grads = torch.autograd.grad(expected, exact, upstream[part].double())
    assert_one_rounding("hidden", hidden[part].detach(), expected.detach())
    assert_close("preact", grads[0][part], expected_grads[0], 4e-3)
    assert_close("logits", grads[1][part], expected_grads[1], 1e-3)


def test_offsets_beyond_32_bits() -> None:
    """The last rows of 2^31 + elements; a 32-bit product would write elsewhere, or fault."""
    config = MoAConfig(variant="bi")
    rows, width = 2**31 // 16384 + 64, 8192
    preact, logits = _inputs(config, rows, width)
    hidden = mixture(preact, logits, config)
    (grad,) = torch.autograd.grad(hidden, preact, torch.ones_like(hidden))
    tail = preact.detach()[-8:].clone().requires_grad_()
    short = mixture(tail, logits[-8:], config)
    (short_grad,) = torch.autograd.grad(short, tail, torch.ones_like(short))
    assert torch.equal(hidden[-8:], short) and torch.equal(grad[-8:], short_grad)


def test_cuda_graph_replays_forward_and_backward() -> None:
    config = MoAConfig(variant="one")
    preact, logits = _inputs(config, 4096, 2048)
    upstream = torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # tuning happens before the capture, as in training
        for _ in range(3):
            torch.autograd.grad(mixture(preact, logits, config), preact, upstream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = mixture(preact, logits, config)
        (grad,) = torch.autograd.grad(hidden, preact, upstream)
    with torch.no_grad():
        preact.copy_(torch.randn_like(preact))
    graph.replay()
    again = mixture(preact, logits, config)
    assert torch.equal(hidden, again)
    assert torch.equal(grad, torch.autograd.grad(again, preact, upstream)[0])


def test_inductor_calls_the_kernel() -> None:
    config = MoAConfig(variant="qd")
    preact, logits = _inputs(config, 512, 2048)
    compiled = torch.compile(lambda p, c: mixture(p * 1.0, c, config) * 1.0, fullgraph=True)
    assert torch.equal(compiled(preact, logits), mixture(preact, logits, config))


def test_tuning_chooses_among_choices_that_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = MoAConfig(variant="bi")
    preact, logits = _inputs(config, 4096, 2048)
    with torch.no_grad():
        tuned = mixture(preact, logits, config)
        monkeypatch.setattr(triton_op, "TUNING_ROWS", 1 << 40)
        for rows in (1, 8):
            monkeypatch.setattr(triton_op, "DEFAULT", dict.fromkeys(triton_op.DEFAULT, rows))
            assert torch.equal(tuned, mixture(preact, logits, config))
