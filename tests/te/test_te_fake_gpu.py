"""The host that poses as a GPU: its kernels against torch's, and Transformer Engine's own words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import isolated, te

ROOT = isolated.ROOT


def _quantisers() -> dict[str, Any]:
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import (
        Float8CurrentScalingQuantizer,
        Float8Quantizer,
    )
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    form = tex.DType.kFloat8E4M3
    both = {"rowwise": True, "columnwise": True}
    return {
        "delayed": Float8Quantizer(torch.tensor([90.0]), torch.zeros(1), form),
        "tensorwise": Float8CurrentScalingQuantizer(form, device=torch.device("cpu")),
        "rows": Float8BlockQuantizer(form, **both, block_scaling_dim=1),
        "squares": Float8BlockQuantizer(form, **both, block_scaling_dim=2),
        "micro": MXFP8Quantizer(form),
    }


def check_eight_bits() -> None:
    """Both copies are within half a step of four-bit fractions, each by its own scales."""
    from tests.fake_gpu import formats

    value = torch.randn(4, 128, 160, generator=torch.Generator().manual_seed(1))
    value[:, :, 128:] *= 1e-3  # a block of its own in every row
    floor = value.abs().max() / 448 / 500  # half a step of the smallest numbers
    for name, quantiser in _quantisers().items():
        made = quantiser(value)
        for along_rows in (True, False):
            found = formats.operand(made, along_rows)
            assert found.shape == value.shape, name
            error = (found - value).abs() - value.abs() / 16
            assert (error <= floor).all() and error.any(), (name, along_rows)
            assert (error[:, :, 128:] <= floor / 1e3).all() == (
                name not in ("delayed", "tensorwise")
            )


def check_an_fp8_product_needs_its_copy() -> None:
    from tests.fake_gpu import formats

    for name, quantiser in _quantisers().items():
        quantiser.set_usage(columnwise=False)
        made = quantiser(torch.randn(128, 128))
        formats.operand(made, True)
        with pytest.raises(AssertionError, match="column"):
            formats.operand(made, False)
        assert name


def check_delayed_scaling_is_that_of_transformer_engine() -> None:
    """Its Python has the same step for algorithms of one's own."""
    from transformer_engine.common.recipe import DelayedScaling, Format
    from transformer_engine.pytorch.quantization import _amax_and_scale_update
    from transformer_engine_torch import DType

    from tests.fake_gpu import kernels

    generator = torch.Generator().manual_seed(2)
    for algorithm in ("max", "most_recent"):
        recipe = DelayedScaling(fp8_format=Format.E4M3, amax_compute_algo=algorithm)
        histories = [torch.rand(4, 3, generator=generator) for _ in range(2)]
        scales = [torch.rand(3, generator=generator) for _ in range(2)]
        histories[0][:, 1] = 0  # nothing was seen: the scale stays
        amax = torch.rand(6, generator=generator) * 3  # over all ranks: others saw more
        amax[1], amax[4] = 0, torch.inf
        wanted = [(history.clone(), scale.clone()) for history, scale in zip(histories, scales)]
        for (history, _), part in zip(wanted, amax.split(3)):
            history[0] = part
        for history, scale in wanted:
            _amax_and_scale_update(history, scale, 448.0, recipe)
        kernels.update_scales(amax, histories, scales, algorithm, DType.kFloat8E4M3, 0)
        for history, scale, (old, other) in zip(histories, scales, wanted):
            assert torch.equal(history, old) and torch.allclose(scale, other, rtol=1e-6)


def check_fp8_parameters_are_cast_in_parts() -> None:
    """As the distributed optimiser does: a rank casts its part, all know the whole's scales."""
    import torch.distributed as dist
    from transformer_engine.pytorch.tensor.utils import (
        cast_master_weights_to_fp8,
        post_all_gather_processing,
    )

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    main = torch.randn(256, 384)
    for name in ("tensorwise", "squares"):
        quantiser = _quantisers()[name]
        weight, whole = quantiser(torch.zeros_like(main)), quantiser(main)
        cast_master_weights_to_fp8(
            *([weight], [main.flatten()], [0], None), manual_post_all_gather_processing=True
        )
        post_all_gather_processing([weight])
        assert torch.equal(weight.dequantize(), whole.dequantize()), name


def check_norms() -> None:
    import transformer_engine.pytorch as engine

    x = torch.randn(5, 3, 64)
    for ours, theirs in (
        (engine.RMSNorm(64), torch.nn.RMSNorm(64, eps=1e-5)),
        (engine.LayerNorm(64), torch.nn.LayerNorm(64)),
    ):
        with torch.no_grad():
            for one, two in zip(ours.parameters(), theirs.parameters()):
                one.copy_(two.normal_())
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [norm(leaf) for norm, leaf in zip((ours, theirs), leaves)]
        for output in outputs:
            (output * x.roll(1)).sum().backward()
        pairs = [outputs, [leaf.grad for leaf in leaves]]
        pairs += [[p.grad, q.grad] for p, q in zip(ours.parameters(), theirs.parameters())]
        for one, two in pairs:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def check_adam() -> None:
    from transformer_engine.pytorch.optimizers import FusedAdam

    start = torch.randn(40)
    words = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.05}
    found = []
    for kind in (FusedAdam, torch.optim.AdamW):
        parameter = torch.nn.Parameter(start.clone())
        optimiser = kind([parameter], **words)
        for step in range(4):
            parameter.grad = (start * step).sin()
            optimiser.step()
        found.append(parameter.detach())
    torch.testing.assert_close(*found)


def check_what_is_not_there_says_so() -> None:
    import transformer_engine_torch as tex

    with pytest.raises(NotImplementedError, match="no moe_permute_fwd of transformer_engine_torch"):
        tex.moe_permute_fwd(torch.ones(1))


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS, variables=te.fake_gpu())


@pytest.mark.parametrize("name", CHECKS)
def test_fake_gpu(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]


@pytest.mark.parametrize(
    ("ci", "ending"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)]
)
def test_only_ci_fails_where_it_cannot_run(
    ci: str, ending: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("MOA_TE_OVERLAY", str(tmp_path / "overlay"))
    for needs in (te.needed, te.fake_gpu, lambda: te.outcomes(__file__, CHECKS)):
        with pytest.raises(ending, match=r"needs .*overlay, which is not there.*MOA_TE_OVERLAY"):
            needs()


def test_programs_may_be_run_on_it() -> None:
    te.fake_gpu()
    program = "import torch; x = torch.ones(2, device='cuda'); print(torch.cuda.get_device_name())"
    command = [sys.executable, "-m", "tests.fake_gpu", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "a host that poses as a GPU\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("file", "selected", "capability"),
    [
        ("experts", "", "9.0"),
        ("models", "", "9.0"),
        ("experts", "fp8 or quant", "10.0"),
        ("models", "fp8", "10.0"),
    ],
)
def test_the_gpu_suite_around_emulated_kernels(file: str, selected: str, capability: str) -> None:
    """All that `make gpu` asks of Transformer Engine's modules, but for its kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs"]
    done = subprocess.run(
        [*command, f"tests/gpu/test_{file}_gpu.py", "-k", selected],
        cwd=ROOT,
        env={**os.environ, **te.fake_gpu(), "MOA_FAKE_GPU": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-3000:]
