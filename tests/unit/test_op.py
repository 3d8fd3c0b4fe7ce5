"""The op's contract: values, every gradient, what is kept for backward, and which backend ran.

Here the reference is measured against float64 and each fused backend's place behind the op is
checked; the kernels themselves are measured in tests/kernels.
"""

import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moa_megatron.activations import ACTIVATIONS, Activation
from moa_megatron.config import ACTIVATION_NAMES, MoAConfig
from moa_megatron.kernels import cpu_op
from moa_megatron.op import mixture, resolve_backend
from moa_megatron.reference import mixture_reference
from tests.helpers.numerics import assert_close, assert_one_rounding, away_from_kinks

VARIANTS = ("type1", "one", "bi", "qd")
MIXINGS = [("moa", "sigmoid"), ("moa", "softmax"), ("moa", "tanh"), ("la", "sigmoid")]
ODD = 19
SHAPES = [(), (1,), (0,), (7,), (3, 2), (2, 1, 3), (2, 0, 3)]
GRADIENT_TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.float16: 6e-4,
    torch.bfloat16: 5e-3,
}

variants = pytest.mark.parametrize("variant", VARIANTS)
mixings = pytest.mark.parametrize(("mixing", "gate"), MIXINGS)
dtypes = pytest.mark.parametrize("dtype", GRADIENT_TOLERANCES, ids=str)


class Operands(NamedTuple):
    preact: Tensor
    coefficients: Tensor
    token_weight: Tensor
    upstream: Tensor


class Result(NamedTuple):
    hidden: Tensor
    preact: Tensor
    coefficients: Tensor
    token_weight: Tensor


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    resolve_backend.cache_clear()
    yield
    resolve_backend.cache_clear()


# Tests of the op around its implementations; one configuration is built once per machine.
needs_compiler = pytest.mark.skipif(
    cpu_op.unavailable() is not None, reason=f"the compiled backend: {cpu_op.unavailable()}"
)
BACKENDS = ["reference", pytest.param("compiled", marks=needs_compiler)]
backends = pytest.mark.parametrize("backend", BACKENDS)


def _operands(
    config: MoAConfig, lead: tuple[int, ...] = (7,), width: int = ODD, dtype: Any = torch.float64
) -> Operands:
    n = config.num_coefficients
    coefficients = (n,) if config.mixing == "la" else (*lead, n)
    shapes = [(*lead, width * (1 + config.gated)), coefficients, lead, (*lead, width)]
    return Operands(
        *(away_from_kinks(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes))
    )


def _run(op: Callable[..., Tensor], operands: Operands, config: MoAConfig) -> Result:
    inputs = [t.detach().clone().requires_grad_() for t in operands[:3]]
    hidden = op(inputs[0], inputs[1], config, inputs[2])
    return Result(hidden.detach(), *torch.autograd.grad(hidden, inputs, operands.upstream))


def _exact(operands: Operands, config: MoAConfig) -> Result:
    return _run(mixture_reference, Operands(*(t.double() for t in operands)), config)


def _assert_gradients(actual: Result, expected: Result, tolerance: float) -> None:
    for name in Result._fields[1:]:
        assert_close(
            f"gradient of {name}", getattr(actual, name), getattr(expected, name), tolerance
        )


@variants
@mixings
@dtypes
def test_values_and_every_gradient(
    variant: Any, mixing: Any, gate: Any, dtype: torch.dtype
) -> None:
    config = MoAConfig(mixing=mixing, variant=variant, gate=gate, backend="reference")
    operands = _operands(config, dtype=dtype)
    actual, expected = _run(mixture, operands, config), _exact(operands, config)
    assert {t.dtype for t in actual} == {dtype}
    if dtype.itemsize == 2:
        assert_one_rounding("hidden", actual.hidden, expected.hidden)
    else:
        assert_close("hidden", actual.hidden, expected.hidden, GRADIENT_TOLERANCES[dtype])
    _assert_gradients(actual, expected, GRADIENT_TOLERANCES[dtype])


@variants
@pytest.mark.parametrize("lead", SHAPES, ids=str)
@pytest.mark.parametrize("mixing", ["moa", "la"])
def test_leading_dimensions(variant: Any, lead: tuple[int, ...], mixing: Any) -> None:
    config = MoAConfig(mixing=mixing, variant=variant, backend="reference")
    operands = _operands(config, lead)
    actual, expected = _run(mixture, operands, config), _exact(operands, config)
    assert actual.hidden.shape == (*lead, ODD)
    assert_close("hidden", actual.hidden, expected.hidden, 1e-13)
    _assert_gradients(actual, expected, 1e-13)


@variants
@mixings
def test_gradcheck(variant: Any, mixing: Any, gate: Any) -> None:
    config = MoAConfig(mixing=mixing, variant=variant, gate=gate, backend="reference")
    _gradcheck(config)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
@pytest.mark.parametrize("variant", ["type1", "bi"])
def test_gradcheck_of_each_activation(name: Any, variant: Any) -> None:
    _gradcheck(MoAConfig(variant=variant, dictionary=(name,), leaky_slope=0.2, backend="reference"))


def _gradcheck(config: MoAConfig) -> None:
    inputs = [t.requires_grad_() for t in _operands(config, lead=(2,), width=2)[:3]]
    assert torch.autograd.gradcheck(lambda p, c, w: mixture(p, c, config, w), inputs)


@backends
def test_strided_input_equals_contiguous(backend: Any) -> None:
    config = MoAConfig(backend=backend)
    operands = _operands(config, lead=(3, 4), dtype=torch.float32)
    spaced = [torch.stack([t, t], dim=-1)[..., 0] for t in operands]
    swapped = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in operands]
    expected = _run(mixture, operands, config)
    for strided in (Operands(*spaced), Operands(*swapped)):
        assert not strided.preact.is_contiguous()
        inputs = [t.requires_grad_() for t in strided[:3]]
        hidden = mixture(inputs[0], inputs[1], config, inputs[2])
        gradients = torch.autograd.grad(hidden, inputs, strided.upstream)
        actual = Result(hidden.detach(), *gradients)
        assert_close("hidden", actual.hidden, expected.hidden, 1e-6)
        _assert_gradients(actual, expected, 1e-6)


@variants
def test_no_token_weight_is_a_weight_of_one(variant: Any) -> None:
    config = MoAConfig(variant=variant, backend="reference")
    operands = _operands(config, dtype=torch.float32)
    ones = operands._replace(token_weight=torch.ones_like(operands.token_weight))
    with_ones = _run(mixture, ones, config)
    inputs = [t.clone().requires_grad_() for t in operands[:2]]
    hidden = mixture(inputs[0], inputs[1], config)
    gradients = torch.autograd.grad(hidden, inputs, operands.upstream)
    for without, ones_ in zip((hidden, *gradients), with_ones, strict=False):
        assert torch.equal(without, ones_)


@backends
def test_two_calls_are_bit_equal(backend: Any) -> None:
    config = MoAConfig(backend=backend)
    operands = _operands(config, lead=(64,), dtype=torch.bfloat16)
    for first, second in zip(
        _run(mixture, operands, config), _run(mixture, operands, config), strict=True
    ):
        assert torch.equal(first, second)


@backends
@pytest.mark.parametrize("weighted", [False, True])
def test_only_the_inputs_are_kept_for_backward(weighted: bool, backend: Any) -> None:
    config = MoAConfig(backend=backend)
    operands = _operands(config, lead=(3, 2), dtype=torch.bfloat16)
    inputs = [t.requires_grad_() for t in operands[: 2 + weighted]]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mixture(inputs[0], inputs[1], config, *inputs[2:])
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in inputs]
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in inputs)


@backends
def test_gradients_come_only_where_asked_for(backend: Any) -> None:
    config = MoAConfig(backend=backend)
    operands = _operands(config, dtype=torch.float32)
    expected = _exact(operands, config)
    for chosen in itertools.product([False, True], repeat=3):
        if not any(chosen):
            continue
        inputs = [
            t.detach().clone().requires_grad_(c) for t, c in zip(operands, chosen, strict=False)
        ]
        mixture(inputs[0], inputs[1], config, inputs[2]).backward(operands.upstream)
        for tensor, wanted, gradient in zip(inputs, chosen, expected[1:], strict=True):
            assert (tensor.grad is not None) == wanted
            if tensor.grad is not None:
                assert_close("gradient", tensor.grad, gradient, 1e-6)


@backends
def test_mixed_dtypes_keep_each_gradient_in_its_own(backend: Any) -> None:
    """Megatron's case: bf16 pre-activations, float32 logits and routing probabilities."""
    config = MoAConfig(backend=backend)
    operands = _operands(config, dtype=torch.float32)
    low = operands._replace(
        preact=operands.preact.bfloat16(), upstream=operands.upstream.bfloat16()
    )
    actual, expected = _run(mixture, low, config), _exact(low, config)
    assert actual.hidden.dtype == actual.preact.dtype == torch.bfloat16
    assert actual.coefficients.dtype == actual.token_weight.dtype == torch.float32
    assert_one_rounding("hidden", actual.hidden, expected.hidden)
    # The fused backends approximate Phi(-a) to a fraction of a bf16 step (kernels/basis.py).
    bound = 1e-6 if backend == "reference" else 1e-4
    assert_close("logits", actual.coefficients, expected.coefficients, bound)


@backends
def test_second_derivatives_are_refused(backend: Any) -> None:
    config = MoAConfig(backend=backend)
    operands = _operands(config, dtype=torch.float32)
    inputs = [t.requires_grad_() for t in operands[:3]]
    hidden = mixture(inputs[0], inputs[1], config, inputs[2])
    (gradient,) = torch.autograd.grad(hidden.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|no autograd formula"):
        gradient.sum().backward()


def test_wrong_operands_are_named_together() -> None:
    config = MoAConfig(variant="bi")
    with pytest.raises(ValueError) as caught:
        mixture(torch.zeros(4, 5), torch.zeros(4, 13), config, torch.zeros(3))
    for part in ("last dimension 5", "(4, 13): expected (4, 14)", "(3,): expected (4,)"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="floating-point"):
        mixture(torch.zeros(4, 6, dtype=torch.long), torch.zeros(4, 14), config)
    with pytest.raises(ValueError, match=r"expected \(14,\)"):
        mixture(torch.zeros(4, 6), torch.zeros(4, 14), MoAConfig(mixing="la"))
    with pytest.raises(ValueError, match="Megatron's own MLP"):
        mixture(torch.zeros(4, 6), torch.zeros(4, 14), MoAConfig(mixing="fixed"))


def test_operands_on_two_devices_and_empty_widths_are_named() -> None:
    config = MoAConfig(variant="bi")
    with pytest.raises(ValueError, match="coefficients is on meta, preact on cpu"):
        mixture(torch.zeros(4, 6), torch.zeros(4, 14, device="meta"), config)
    with pytest.raises(ValueError, match="token_weight is on meta"):
        mixture(torch.zeros(4, 6), torch.zeros(4, 14), config, torch.zeros(4, device="meta"))
    with pytest.raises(ValueError, match="at least one column"):
        mixture(torch.zeros(4, 0), torch.zeros(4, 14), config)


def test_without_triton_a_gpu_takes_the_reference_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "moa_megatron.kernels.triton_op", None)
    monkeypatch.delattr("moa_megatron.kernels.triton_op", raising=False)
    assert resolve_backend("auto", "cuda", torch.bfloat16) == "reference"
    with pytest.raises(ValueError, match="triton is not importable"):
        resolve_backend("triton", "cuda", torch.bfloat16)


def _mutants(operands: Operands, config: MoAConfig) -> Iterator[tuple[str, Tensor]]:
    """Outputs of plausible mistakes."""
    preact, coefficients, weight, _ = operands
    hidden = mixture(preact, coefficients, config, weight)
    yield "zeroed", torch.zeros_like(hidden)
    yield "sign flipped", -hidden
    yield "permuted", mixture(preact, coefficients.roll(1, dims=-1), config, weight)
    yield "no token weight", mixture(preact, coefficients, config)
    yield "one row off", hidden.roll(1, dims=0)
    if config.gated:
        swapped = torch.cat(preact.chunk(2, dim=-1)[::-1], dim=-1)
        yield "y and z exchanged", mixture(swapped, coefficients, config, weight)


@variants
@mixings
@dtypes
def test_the_bounds_bite(variant: Any, mixing: Any, gate: Any, dtype: torch.dtype) -> None:
    config = MoAConfig(mixing=mixing, variant=variant, gate=gate, backend="reference")
    operands = _operands(config, dtype=dtype)
    expected = _exact(operands, config)
    for name, mutant in _mutants(operands, config):
        with pytest.raises(AssertionError, match="exceeds"):
            assert_close(name, mutant, expected.hidden, GRADIENT_TOLERANCES[dtype])
        with pytest.raises(AssertionError, match="steps of"):
            assert_one_rounding(name, mutant, expected.hidden)
    actual = _run(mixture, operands, config)
    for index in range(1, 4):
        for factor in (0.0, -1.0):
            fields = list(actual)
            fields[index] = fields[index] * factor
            with pytest.raises(AssertionError, match="exceeds"):
                _assert_gradients(Result(*fields), expected, GRADIENT_TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["gelu", "silu", "tanh"])
def test_the_bounds_tell_approximate_activations(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tanh form of GELU, or a derivative off by one part in a thousand, must be noticed."""
    config = MoAConfig(variant="type1", dictionary=(name,), backend="reference")
    operands = _operands(config, dtype=torch.float32)
    expected, row = _exact(operands, config), ACTIVATIONS[name]
    approximate = (
        (lambda x, _: torch.nn.functional.gelu(x, approximate="tanh"))
        if name == "gelu"
        else (lambda x, slope: row.function(x, slope) * 1.001)
    )
    monkeypatch.setitem(ACTIVATIONS, name, Activation(approximate, row.derivative))
    actual = _run(mixture, operands, config)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(name, actual.hidden, expected.hidden, GRADIENT_TOLERANCES[torch.float32])
    with pytest.raises(AssertionError, match="exceeds"):
        _assert_gradients(actual, expected, GRADIENT_TOLERANCES[torch.float32])


def _logged(caplog: pytest.LogCaptureFixture, config: MoAConfig, times: int = 1) -> str:
    with caplog.at_level(logging.INFO, logger="moa_megatron.op"):
        for _ in range(times):
            _run(mixture, _operands(config, dtype=torch.float32), config)
    (record,) = caplog.records
    return record.getMessage()


@needs_compiler
def test_automatic_choice_is_the_kernel_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    message = _logged(caplog, MoAConfig(), times=3)
    assert message == "mixture of activations on cpu: compiled backend (the fastest here)"


def test_automatic_choice_without_a_compiler_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_op, "unavailable", lambda: "no C++ compiler")
    message = _logged(caplog, MoAConfig())
    assert "on cpu: reference backend (slow; compiled cannot run: no C++ compiler" in message


@backends
def test_forced_choice_is_logged_as_asked_for(
    backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    message = _logged(caplog, MoAConfig(backend=backend))
    assert message == f"mixture of activations on cpu: {backend} backend (as asked)"


@backends
def test_forced_backends_run_their_own_code(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for owner, name in [
        (cpu_op, "forward"),
        (cpu_op, "backward"),
        (sys.modules["moa_megatron.op"], "mixture_reference"),
    ]:
        original = getattr(owner, name)

        def spy(*args: Any, _name: str = name, _run: Any = original) -> Any:
            calls.append(_name)
            return _run(*args)

        monkeypatch.setattr(owner, name, spy)
    config = MoAConfig(backend=backend)
    for rows in (0, 1, 2):
        calls.clear()
        _run(mixture, _operands(config, (rows,), dtype=torch.float32), config)
        reference = ["mixture_reference"] * 2  # again in the backward pass
        assert calls == (reference if backend == "reference" else ["forward", "backward"])


@pytest.mark.parametrize(
    ("backend", "reason"),
    [("compiled", "no C++ compiler"), ("triton", "it needs CUDA tensors")],
)
def test_forcing_an_impossible_backend_is_an_error(
    backend: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_op, "unavailable", lambda: "no C++ compiler")
    config = MoAConfig(backend=backend)
    with pytest.raises(ValueError) as caught:
        _run(mixture, _operands(config, dtype=torch.float32), config)
    assert f"backend='{backend}' cannot run on cpu: {reason}" in str(caught.value)
    assert "or use 'auto'" in str(caught.value)


def test_double_precision_is_the_references() -> None:
    with pytest.raises(ValueError, match=r"torch.float64 is served by 'reference' only"):
        mixture(torch.zeros(2, 6).double(), torch.zeros(2, 14), MoAConfig(backend="compiled"))
    assert resolve_backend("auto", "cpu", torch.float64) == "reference"


@backends
def test_activation_recompute_gives_the_same_bits(backend: Any) -> None:
    config = MoAConfig(backend=backend)
    operands = _operands(config, dtype=torch.float32)

    def recomputed(*inputs: Any) -> Tensor:
        result: Tensor = checkpoint(mixture, *inputs, use_reentrant=False)
        return result

    plain = _run(mixture, operands, config)
    again = _run(recomputed, operands, config)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@needs_compiler
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mixing", ["moa", "la"])
def test_operators_keep_what_torch_expects_of_them(mixing: Any, weighted: bool) -> None:
    """Schema, fake implementation, autograd registration, dynamic shapes under torch.compile."""
    config = MoAConfig(mixing=mixing, backend="compiled")
    preact, coefficients, weight, upstream = _operands(config, dtype=torch.float32)
    inputs = [t.requires_grad_() for t in (preact, coefficients, weight)]
    words = (*inputs[:2], inputs[2] if weighted else None, config.encoded)
    torch.library.opcheck(torch.ops.moa_megatron.mixture.default, words)
    detached = [w.detach() if isinstance(w, Tensor) else w for w in words]
    torch.library.opcheck(
        torch.ops.moa_megatron.mixture_backward.default,
        (upstream, *detached),
        test_utils=("test_schema", "test_faketensor"),
    )


@backends
def test_torch_compile_takes_the_op_whole(backend: Any) -> None:
    """One graph, no break; `aot_eager` traces forward and backward without generating code."""
    config = MoAConfig(backend=backend)
    operands = _operands(config, dtype=torch.float32)

    def layer(preact: Tensor, coefficients: Tensor, config: MoAConfig, weight: Tensor) -> Tensor:
        return mixture(preact * 1.0, coefficients, config, weight)

    whole = torch.compile(layer, backend="aot_eager", fullgraph=True)
    plain, compiled = _run(mixture, operands, config), _run(whole, operands, config)
    for one, other in zip(plain, compiled, strict=True):
        assert_close("compiled", other, one, 1e-6)


def test_encoded_config_is_the_config() -> None:
    config = MoAConfig(variant="qd", dictionary=("id", "silu"), leaky_slope=0.1)
    assert MoAConfig.decode(config.encoded) == config
