"""Grouped experts on Transformer Engine's layers, as far as that goes without a GPU."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from moa_megatron.config import MoAConfig
from tests.helpers import te
from tests.helpers.experts import global_tensors

EXPERTS, WIDTH = 4, 32
SETTINGS = MoAConfig(gate_scope="expert", backend="reference", gate_init_std=0.3)


def built() -> dict[str, Any]:
    """The three kinds of experts, from the same seed, on one rank."""
    import torch.distributed as dist
    import transformer_engine.pytorch  # noqa: F401
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    from moa_megatron.experts import MoAGroupedMLP, MoASequentialMLP, MoATEGroupedMLP

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=4,
        ffn_hidden_size=24,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        num_moe_experts=EXPERTS,
        moe_router_topk=2,
        moe_ffn_hidden_size=16,
        moe_grouped_gemm=True,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
    )
    kinds: dict[str, Any] = {
        "sequential": (MoASequentialMLP, LocalSpecProvider()),
        "grouped": (MoAGroupedMLP, LocalSpecProvider()),
        "te": (MoATEGroupedMLP, TESpecProvider()),
    }
    experts = {}
    for name, (kind, backend) in kinds.items():
        torch.manual_seed(5)
        submodules = backend.grouped_mlp_modules(True).keywords["submodules"]
        groups = ProcessGroupCollection.use_mpu_process_groups()
        # TE's constructors ask; with parameters on the CPU that is all they need a device for.
        with mock.patch("torch.cuda.is_available", lambda: True):
            experts[name] = kind(EXPERTS, config, submodules, groups, moa=SETTINGS)
    return experts


def check_constructs_with_the_names_of_te() -> None:
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    te = built()["te"]
    assert isinstance(te, TEGroupedMLP)
    names = {name for name, _ in te.named_parameters()}
    expected = ("linear_fc1", "linear_fc2", "moa_gate")
    assert names == {f"{module}.weight{i}" for module in expected for i in range(EXPERTS)}
    assert {p.dim() for p in te.parameters()} == {2}, "Muon takes matrices only"


def check_gates_start_as_those_of_other_experts() -> None:
    experts = built()
    for index in range(EXPERTS):
        gate = getattr(experts["te"].moa_gate, f"weight{index}")
        assert torch.equal(gate, getattr(experts["grouped"].moa_gate, f"weight{index}"))
        other = experts["sequential"].local_experts[index].moa_gate.weight
        assert torch.equal(gate, other)
        assert vars(gate) == vars(other), "gradients would be reduced in another way"


def check_checkpoints_have_the_same_tensors() -> None:
    experts = built()
    for singleton in (False, True):
        found = {name: global_tensors(module, singleton) for name, module in experts.items()}
        assert found["te"] == found["grouped"] == found["sequential"]
    found = {name: global_tensors(module) for name, module in experts.items()}
    assert found["te"]["experts.moa_gate.weight"] == (EXPERTS, 14, WIDTH)
    assert "experts.linear_fc1._extra_state" in found["te"]


def product(module: Any, x: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, None]:
    """What TE's grouped kernel computes, without a GPU."""
    from moa_megatron.grouped_linear import grouped_linear

    return grouped_linear(x, [getattr(module, f"weight{i}") for i in range(EXPERTS)], counts), None


def check_forward_around_replaced_products() -> None:
    """TE's kernels need a GPU; all around them does not."""
    from megatron.core.extensions.transformer_engine import TEGroupedLinear

    from moa_megatron import observing

    experts = built()
    te, grouped = experts["te"], experts["grouped"]
    te.load_state_dict(grouped.state_dict(), strict=False)
    x, probs = torch.randn(12, WIDTH), torch.rand(12)
    counts = torch.tensor([5, 0, 4, 3])
    with (
        mock.patch.object(TEGroupedLinear, "forward", product),
        observing.recording(),
        mock.patch("megatron.core.transformer.moe.moe_utils.te_general_gemm", None),
    ):
        outputs = [module(x, counts, probs)[0] for module in (te, grouped)]
        assert torch.equal(outputs[0], outputs[1])
        for output in outputs:
            output.sum().backward()
    seen = observing.take()
    assert torch.equal(seen[te].gates, seen[grouped].gates) and seen[te].gates[-1] == 12
    assert seen[te].hidden == seen[grouped].hidden and seen[te].preact == seen[grouped].preact
    for name, parameter in te.named_parameters():
        assert torch.equal(parameter.grad, grouped.get_parameter(name).grad), name


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return te.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_te_grouped(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
