"""Grouped experts against sequential ones: same start, same values, same gradients."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moa_megatron.config import MoAConfig
from tests.helpers import isolated
from tests.helpers.cases import Layout, Model, moa
from tests.helpers.numerics import assert_close

EXPERTS, WIDTH = 4, 32
# An expert without tokens, one with many, none at all.
LOADS = ([5, 0, 17, 2], [24, 0, 0, 0], [0, 0, 0, 0])
# The same products in the same order, but the gradients of the input are added up in another.
ROUNDING = 1e-6


def megatron() -> Any:
    """Host mode and one process as a group of one; returns the groups that experts ask for."""
    import torch.distributed as dist

    from moa_megatron import host, patches

    if not dist.is_initialized():
        host.install()
        patches.apply()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups


def pair(settings: MoAConfig, bfloat16: bool = False, **options: Any) -> tuple[Any, Any]:
    """Sequential and grouped experts, built from the same state of the random generators."""
    groups = megatron()
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from moa_megatron.experts import MoAGroupedMLP, MoASequentialMLP
    from tests.helpers.models import transformer_config

    config = transformer_config(Model(moe=True, moa=settings), Layout())
    for name, value in options.items():
        setattr(config, name, value)
    if bfloat16:
        config.params_dtype = torch.bfloat16
    submodules = LocalSpecProvider().grouped_mlp_modules(True).keywords["submodules"]  # type: ignore[attr-defined]
    built = []
    for kind in (MoASequentialMLP, MoAGroupedMLP):
        torch.manual_seed(3)
        model_parallel_cuda_manual_seed(3, force_reset_rng=True)
        built.append(kind(EXPERTS, config, submodules, groups(), moa=settings))
    return built[0], built[1]


def by_expert(module: Any) -> dict[str, Tensor]:
    """Parameters under the names that grouped experts give them."""
    names = {}
    for name, parameter in module.named_parameters():
        if name.startswith("local_experts."):
            _, index, rest = name.split(".", 2)
            name = rest + index
        names[name] = parameter
    return names


def run(module: Any, loads: list[int], dtype: Any = torch.float32) -> dict[str, Tensor]:
    """Output and every gradient of one pass over tokens that depend on ``loads`` alone."""
    generator = torch.Generator().manual_seed(sum(loads))
    tokens = sum(loads)
    x = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(tokens, generator=generator).requires_grad_()
    output, bias = module(x, torch.tensor(loads), probs)
    assert bias is None
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
    tensors = {"output": output.detach(), "x": x.grad, "probs": probs.grad}
    tensors |= {name: p.grad for name, p in by_expert(module).items()}
    module.zero_grad(set_to_none=True)
    assert all(tensor is not None for tensor in tensors.values()), "a gradient is missing"
    return tensors  # type: ignore[return-value]


def compare(sequential: Any, grouped: Any, dtype: Any = torch.float32) -> None:
    ours, theirs = by_expert(grouped), by_expert(sequential)
    assert ours.keys() == theirs.keys()
    assert any("moa_gate" in name for name in ours)
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), f"{name} starts from other numbers"
        assert vars(parameter).keys() == vars(theirs[name]).keys()
    for loads in LOADS:
        expected = run(sequential, loads, dtype)
        for name, tensor in run(grouped, loads, dtype).items():
            assert_close(f"{name} of {loads}", tensor, expected[name], ROUNDING)


def expert_scope(**choices: Any) -> MoAConfig:
    return moa(gate_scope="expert", **choices)


def check_every_variant_and_gate_function() -> None:
    megatron()
    from tests.helpers.models import model_parallel

    with model_parallel(Layout()):
        for variant, gate in itertools.product(
            ("type1", "one", "bi", "qd"), ("sigmoid", "softmax", "tanh")
        ):
            compare(*pair(expert_scope(variant=variant, gate=gate)))


def check_learned_coefficients() -> None:
    megatron()
    from tests.helpers.models import model_parallel

    with model_parallel(Layout()):
        sequential, grouped = pair(expert_scope(mixing="la"))
        for index in range(EXPERTS):  # they all start at 1, where a mix-up would go unnoticed
            scalars = torch.randn(14)
            by_expert(sequential)[f"moa_gate.weight{index}"].data.copy_(scalars)
            by_expert(grouped)[f"moa_gate.weight{index}"].data.copy_(scalars)
        compare(sequential, grouped)


def check_bfloat16() -> None:
    megatron()
    from tests.helpers.models import model_parallel

    with model_parallel(Layout()):
        compare(*pair(expert_scope(), bfloat16=True), dtype=torch.bfloat16)
        gate = pair(expert_scope(), bfloat16=True)[1].moa_gate
        logits = gate(torch.randn(3, WIDTH, dtype=torch.bfloat16), [1, 0, 2, 0])
        assert logits.dtype == torch.float32 and gate.weight0.dtype == torch.bfloat16


def check_biases() -> None:
    megatron()
    from tests.helpers.models import model_parallel

    with model_parallel(Layout()):
        sequential, grouped = pair(expert_scope(), add_bias_linear=True)
        for name, parameter in by_expert(grouped).items():
            if "bias" in name:
                torch.nn.init.normal_(parameter)
                by_expert(sequential)[name].data.copy_(parameter.data)
        assert "linear_fc2.bias3" in by_expert(grouped)
        compare(sequential, grouped)


def check_grouped_product() -> None:
    """The path that GPUs take; torch runs the same function on the CPU, as a loop."""
    megatron()
    from moa_megatron import grouped_linear
    from tests.helpers.models import model_parallel

    def has_tokens(x: Tensor, _: Tensor) -> bool:
        return bool(x.numel())

    product = torch.nn.functional.grouped_mm
    with (
        model_parallel(Layout()),
        mock.patch.object(grouped_linear, "_has_grouped_kernel", has_tokens),
        mock.patch("torch.nn.functional.grouped_mm", side_effect=product) as calls,
    ):
        compare(*pair(expert_scope()))
        compare(*pair(expert_scope(), add_bias_linear=True))
        assert calls.call_count == 24, "two layers, three products each, two loads, two models"
        x, weights = torch.randn(5, 8), [torch.randn(16, 8, requires_grad=True) for _ in range(3)]
        kept: list[Tensor] = []
        hooks = (lambda t: kept.append(t) or t, lambda t: t)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            grouped_linear.grouped_linear(x, weights, [2, 0, 3])
        places = {t.data_ptr() for t in kept if t.is_floating_point()}
        assert places == {t.data_ptr() for t in (x, *weights)}, "no copy of the experts"


def check_latent_input() -> None:
    megatron()
    from tests.helpers.models import model_parallel

    with model_parallel(Layout()):
        grouped = pair(expert_scope(), moe_latent_size=8)[1]
        assert grouped.moa_gate.weight0.shape == (14, 8)
        assert grouped(torch.randn(4, 8), torch.tensor([1, 1, 0, 2]), torch.rand(4))[0].shape == (
            4,
            8,
        )


def check_gradients_of_the_mixture_survive_recomputation() -> None:
    megatron()
    from tests.helpers.models import model_parallel

    with model_parallel(Layout()):
        for settings in (expert_scope(), expert_scope(mixing="la")):
            grouped = pair(settings)[1]
            for loads in LOADS[:2]:
                expected = run(grouped, loads)
                grouped.activation_recompute = True
                found = run(grouped, loads)
                grouped.activation_recompute = False
                assert all(torch.equal(found[name], expected[name]) for name in expected)


def check_padding_for_quantisation_changes_nothing() -> None:
    """Gates read the padded tokens; rows of padding have weight zero, and are cut off."""
    megatron()
    from tests.helpers.models import model_parallel

    def pad(rows: Tensor, counts: list[int]) -> tuple[Tensor, list[int]]:
        whole = [-(-count // 16) * 16 for count in counts]
        blocks = zip(rows.split(counts), whole, strict=True)
        blocks_padded = [torch.cat([b, b.new_zeros(n - len(b), b.shape[1])]) for b, n in blocks]
        return torch.cat(blocks_padded), whole

    def unpad(rows: Tensor, counts: list[int]) -> Tensor:
        whole = [-(-count // 16) * 16 for count in counts]
        return torch.cat([b[:n] for b, n in zip(rows.split(whole), counts, strict=True)])

    with model_parallel(Layout()):
        grouped = pair(expert_scope())[1]
        expected = run(grouped, LOADS[0])
        grouped.config.fp8 = "e4m3"
        grouped.quantization_padding, grouped.quantization_unpadding = pad, unpad
        padded = run(grouped, LOADS[0])
        grouped.config.moe_router_padding_for_quantization = True  # the router has padded
        grouped.quantization_padding = None
        unpadded = run(grouped, LOADS[0])
        for name, tensor in expected.items():
            assert_close(f"padded {name}", padded[name], tensor, ROUNDING)
            assert torch.equal(unpadded[name], tensor)


def check_names_in_checkpoints() -> None:
    megatron()
    from tests.helpers.experts import global_tensors
    from tests.helpers.models import model_parallel

    with model_parallel(Layout()):
        for options in ({}, {"add_bias_linear": True}):
            sequential, grouped = pair(expert_scope(), **options)
            for singleton in (False, True):
                assert global_tensors(grouped, singleton) == global_tensors(sequential, singleton)


def check_refusals() -> None:
    megatron()
    from tests.helpers.models import model_parallel

    with model_parallel(Layout()):
        for option in ("use_transformer_engine_op_fuser", "moe_apply_probs_on_input"):
            with pytest.raises(ValueError, match=option):
                pair(expert_scope(), **{option: True})
        with pytest.raises(ValueError, match="--swiglu"):
            pair(expert_scope(), gated_linear_unit=False)
        grouped = pair(expert_scope())[1]
        x = torch.randn(4, WIDTH)
        with pytest.raises(ValueError, match="buffers"):
            grouped(x, torch.tensor([4, 0, 0, 0]), torch.rand(4), output_buffer=x)


def check_chosen_when_the_model_is_built() -> None:
    groups = megatron()
    from megatron.core.models.backends import LocalSpecProvider

    from moa_megatron.experts import MoAGroupedMLP, MoASequentialMLP, build_experts
    from tests.helpers.models import model_parallel, transformer_config

    ours = LocalSpecProvider().grouped_mlp_modules(True).keywords["submodules"]  # type: ignore[attr-defined]
    other = SimpleNamespace(linear_fc1=lambda *a, **k: ours.linear_fc1(*a, **k))
    other.linear_fc2, other.activation_func = ours.linear_fc2, None
    with model_parallel(Layout()):
        for asked, submodules, kind in (
            (False, ours, MoASequentialMLP),
            (True, ours, MoAGroupedMLP),
            (True, other, MoASequentialMLP),
        ):
            config = transformer_config(Model(moe=True), Layout())
            config.moe_grouped_gemm = asked
            assert type(build_experts(EXPERTS, config, submodules, groups(), moa=moa())) is kind


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_grouped(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
