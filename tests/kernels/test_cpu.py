"""The C++ kernels of the CPU backend against the float64 reference, and how they are built."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moa_megatron.config import ACTIVATION_NAMES, MoAConfig
from moa_megatron.kernels import cpu_op
from moa_megatron.reference import mixture_reference
from tests.helpers.numerics import assert_close, assert_one_rounding, away_from_kinks

pytestmark = pytest.mark.skipif(cpu_op.unavailable() is not None, reason="no C++ compiler")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCES = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
SHAPES = [(7, 1), (1, 3), (7, 19), (3, 853)]
CONFIGS = [
    MoAConfig(variant="type1", gate="softmax"),
    MoAConfig(variant="one", gate="tanh"),
    MoAConfig(variant="bi"),
    MoAConfig(variant="bi", gate="softmax", leaky_slope=0.2),
    MoAConfig(variant="qd"),
    MoAConfig(variant="qd", mixing="la", dictionary=ACTIVATION_NAMES),
    MoAConfig(variant="bi", mixing="la"),
]
BI = MoAConfig(variant="bi")
FRESH = MoAConfig(variant="type1", dictionary=("id",), leaky_slope=0.123)

configs = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: f"{c.variant}-{c.mixing}-{c.gate}"
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAMES = ("hidden", "preact", "coefficients", "token_weight")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches: list[Any] = [cpu_op.unavailable, cpu_op._machine, cpu_op._library, cpu_op._key]
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


def _operands(config: MoAConfig, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Pre-activations, coefficients, token weights and the upstream gradient."""
    n = config.num_coefficients
    coefficients = (n,) if config.mixing == "la" else (rows, n)
    shapes: list[tuple[int, ...]] = [(rows, width * (1 + config.gated)), coefficients, (rows,)]
    shapes.append((rows, width))
    return [away_from_kinks(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]


def _run(config: MoAConfig, operands: list[Tensor], weighted: bool = True) -> list[Tensor]:
    preact, coefficients, weight, grad = operands
    given = weight if weighted else None
    grads = cpu_op.backward(grad, preact, coefficients, given, config)
    hidden = cpu_op.forward(preact, coefficients, given, config)
    return [hidden, *(g for g in grads if g is not None)]


def _exact(config: MoAConfig, operands: list[Tensor], weighted: bool = True) -> list[Tensor]:
    inputs = [t.detach().double().requires_grad_() for t in operands[: 2 + weighted]]
    hidden = mixture_reference(inputs[0], inputs[1], config, *inputs[2:])
    grads = torch.autograd.grad(hidden, inputs, operands[3].double())
    return [hidden.detach(), *grads]


def _compare(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    assert len(actual) == len(expected)
    for name, one, other in zip(NAMES, actual, expected):
        assert one.dtype == dtype
        # The gradient of one token's weight is one sum, which may cancel: no RMS evens that out.
        slack = 3.0 if other.numel() == 1 else 1.0
        assert_close(name, one, other, slack * TOLERANCES[dtype])
    if dtype != torch.float32:
        assert_one_rounding("hidden", actual[0], expected[0])


@configs
@dtypes
@pytest.mark.parametrize("weighted", [True, False])
def test_values_and_gradients(config: MoAConfig, dtype: torch.dtype, weighted: bool) -> None:
    for rows, width in SHAPES:
        operands = _operands(config, rows, width, dtype)
        actual, expected = _run(config, operands, weighted), _exact(config, operands, weighted)
        _compare(actual, expected, dtype)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_a_dictionary_of_one(name: str) -> None:
    config = MoAConfig(variant="type1", dictionary=(name,), leaky_slope=0.2)
    for dtype in DTYPES:
        operands = _operands(config, 3, 37, dtype)
        _compare(_run(config, operands), _exact(config, operands), dtype)


@pytest.mark.parametrize("config", [BI, CONFIGS[-1]], ids=["moa", "la"])
def test_no_rows(config: MoAConfig) -> None:
    operands = _operands(config, 0, 19, torch.float32)
    for one, other in zip(_run(config, operands), _exact(config, operands)):
        assert torch.equal(one, other.float())


@dtypes
def test_strided_rows_and_mixed_dtypes(dtype: torch.dtype) -> None:
    wide, coefficients, weight, grad = _operands(BI, 7, 43, dtype)
    preact, slope = wide[:, 5 : 5 + 2 * 19], grad[:, 3 : 3 + 19]
    operands = [preact, coefficients.float(), weight.bfloat16(), slope]
    actual, expected = _run(BI, operands), _exact(BI, operands)
    assert [t.dtype for t in actual] == [dtype, dtype, torch.float32, torch.bfloat16]
    for name, one, other in zip(NAMES, actual, expected):
        assert_close(name, one, other, max(TOLERANCES[dtype], TOLERANCES[one.dtype]))
    columns = [preact.T.contiguous().T, *operands[1:3], slope.T.contiguous().T]
    for one, other in zip(_run(BI, columns), actual):
        assert torch.equal(one, other)


@dtypes
def test_large_outputs_are_complete(dtype: torch.dtype) -> None:
    """Outputs past the size from which stores bypass the caches; memory is poisoned before."""
    operands = _operands(BI, 1031, 2048, dtype)
    for poison in [torch.full((1031, 4096), float("nan"), dtype=dtype) for _ in range(2)]:
        del poison
    actual = _run(BI, operands)
    some = torch.arange(0, 1031, 206)
    _compare([t[some] for t in actual], _exact(BI, [t[some].contiguous() for t in operands]), dtype)
    assert all(bool(t.isfinite().all()) for t in actual)


@dtypes
def test_extreme_inputs(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 0.3, -0.3, 9.0, -9.0, 30.0, -30.0])
    large = torch.tensor([1e4, -1e4])
    for config in (BI, CONFIGS[1]):
        for row in (values, large):
            preact = torch.cat([row, row.flip(0)]).to(dtype)[None]
            operands = _operands(config, 1, len(row), torch.float32)
            if row is large and dtype == torch.float16:
                continue  # squares of 1e4 overflow
            operands[0], operands[3] = preact, operands[3].to(dtype)
            actual, expected = _run(config, operands), _exact(config, operands)
            assert all(bool(t.isfinite().all()) for t in actual)
            for name, one, other in zip(NAMES, actual, expected):
                assert_close(name, one, other, max(TOLERANCES[dtype], TOLERANCES[one.dtype]))


def test_small_inputs_keep_their_digits() -> None:
    config = MoAConfig(variant="type1", dictionary=("tanh",), leaky_slope=0.2)
    x = torch.logspace(-30, 0.5, 997)[None]
    hidden = cpu_op.forward(x, torch.full((1, 1), 30.0), None, config)
    assert ((hidden.double() - x.double().tanh()) / x.double().tanh()).abs().max() < 5e-7


@dtypes
def test_nan_propagates(dtype: torch.dtype) -> None:
    operands = _operands(BI, 2, 19, dtype)
    operands[0][0, 4] = float("nan")
    hidden, grad, *_ = _run(BI, operands)
    assert torch.equal(hidden.isnan().nonzero(), torch.tensor([[0, 4]]))
    assert torch.equal(grad.isnan().nonzero(), torch.tensor([[0, 4], [0, 4 + 19]]))


@pytest.mark.parametrize("config", [BI, CONFIGS[-1]], ids=["moa", "la"])
def test_threads_change_no_bit(config: MoAConfig) -> None:
    operands = _operands(config, 101, 853, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(_run(config, operands))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results):
        assert torch.equal(one, other)


def test_float64_is_refused() -> None:
    operands = _operands(BI, 2, 3, torch.float64)
    with pytest.raises(ValueError, match="float64"):
        cpu_op.forward(operands[0], operands[1], None, BI)


def test_ranks_that_build_at_once(empty_cache: Path) -> None:
    """Two processes, one empty cache: both get a whole library and nothing is left behind."""
    code = (
        "import torch; from moa_megatron.config import MoAConfig; "
        "from moa_megatron.kernels import cpu_op; "
        "c = MoAConfig(variant='type1', dictionary=('id',), leaky_slope=0.123); "
        "seconds = cpu_op.prepare(c); assert cpu_op.prepare(c) == 0.0; "
        "print(cpu_op.forward(torch.ones(2, 3), torch.zeros(2, 1), None, c).sum().item())"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [float(rank.communicate()[0]) for rank in ranks] == [3.0, 3.0]
    assert {path.suffix for path in (empty_cache / "moa_megatron" / "kernels").iterdir()} == {
        ".so",
        ".lock",
    }
    assert cpu_op.prepare(FRESH) == 0.0


def test_a_failing_compiler_is_quoted(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = empty_cache / "broken"
    compiler.write_text("#!/bin/sh\necho no such instruction >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match=r"(?s)--moa-backend reference.*no such instruction"):
        cpu_op.prepare(FRESH)
    assert not list(empty_cache.rglob("*.so"))


def test_without_a_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    nothing: Callable[[str], None] = lambda name: None  # noqa: E731
    monkeypatch.setattr(shutil, "which", nothing)
    assert "--moa-backend reference" in (cpu_op.unavailable() or "")


def test_a_compiler_that_cannot_build_is_not_chosen(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = empty_cache / "broken"
    compiler.write_text("#!/bin/sh\necho error: no such instruction >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "error: no such instruction" in (cpu_op.unavailable() or "")


def test_a_cache_that_cannot_be_written_is_named(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache / "file"))
    assert "XDG_CACHE_HOME" in (cpu_op.unavailable() or "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache))
    cpu_op.unavailable.cache_clear()
    assert cpu_op.unavailable() is None
    assert [path.name[:7] for path in cpu_op._cache().iterdir()] == ["probed-"]


def test_a_cache_that_breaks_after_the_choice_is_named_with_the_cure(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache / "file"))
    with pytest.raises(RuntimeError, match="XDG_CACHE_HOME.*--moa-backend reference"):
        cpu_op.prepare(FRESH)
