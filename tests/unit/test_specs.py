"""``with_moa`` on Megatron's own specifications: what it exchanges, shares, and refuses."""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch

from moa_megatron.config import MoAConfig
from tests.helpers import isolated

BI = MoAConfig()


def megatron() -> None:
    from moa_megatron import host, patches

    host.install()
    patches.apply()


def found(node: Any, seen: set[int] | None = None) -> list[str]:
    """Names of the callables behind all partials of a specification tree, depth first."""
    from megatron.core.transformer.spec_utils import ModuleSpec

    if isinstance(node, partial):
        owner = getattr(node.func, "__self__", None)
        name = (owner if isinstance(owner, type) else node.func).__name__
        return [name, *found(node.keywords.get("submodules"))]
    if isinstance(node, ModuleSpec):
        return found(node.submodules)
    if isinstance(node, list):
        return [name for item in node for name in found(item)]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        values = [getattr(node, field.name) for field in dataclasses.fields(node)]
        return [name for value in values for name in found(value)]
    return []


MOE_NAMES = ["MoELayer", "SequentialMLP", "_build_shared_experts"]
MOA_NAMES = ["MoALayer", "build_experts", "build_shared_experts"]


def check_every_local_specification() -> None:
    megatron()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from moa_megatron.local_specs import local_hybrid_stack_spec
    from moa_megatron.specs import with_moa

    cases = [
        (get_gpt_layer_local_spec(normalization="RMSNorm"), ["MLP"], ["MoAMLP"]),
        (get_gpt_layer_local_spec(num_experts=4, normalization="RMSNorm"), MOE_NAMES, MOA_NAMES),
        (local_hybrid_stack_spec(), ["MLP", *MOE_NAMES], ["MoAMLP", *MOA_NAMES]),
    ]
    for spec, before, after in cases:
        assert found(spec) == before
        assert found(with_moa(spec, BI)) == after
        assert found(spec) == before, "the specification itself must stay as it was"
        assert with_moa(spec, MoAConfig(mixing="fixed")) is spec


def check_what_is_not_exchanged_is_shared() -> None:
    megatron()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from moa_megatron.specs import with_moa

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    ours = with_moa([spec, spec], BI)
    assert ours[0] is ours[1], "a layer met twice is rebuilt once"
    assert ours[0].module is spec.module
    assert ours[0].submodules.self_attention is spec.submodules.self_attention
    keys = "sharded_state_dict_keys_map"
    assert getattr(ours[0].submodules, keys) == getattr(spec.submodules, keys)


def check_module_spec_of_mlp_is_accepted() -> None:
    megatron()
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    from moa_megatron.specs import with_moa

    old_style = ModuleSpec(module=MLP, submodules=MLPSubmodules(object, object))  # type: ignore[arg-type]
    layer = TransformerLayerSubmodules(mlp=old_style)
    assert found(with_moa(layer, BI)) == ["MoAMLP"]


def check_refusals() -> None:
    megatron()
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.experts import InferenceGroupedMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    from moa_megatron.specs import with_moa

    class OwnMLP(MLP):
        pass

    unknown: list[Any] = [
        partial(OwnMLP.as_mlp_submodule),
        partial(InferenceGroupedMLP),
        ModuleSpec(OwnMLP),
        ModuleSpec(MoELayer),
        OwnMLP,
    ]
    for node in unknown:
        with pytest.raises(ValueError, match="does not replace"):
            with_moa(TransformerLayerSubmodules(mlp=node), BI)
    empty = TransformerBlockSubmodules(layer_specs=[])
    assert with_moa(empty, BI) is empty, "a pipeline stage may have no layers"
    with pytest.raises(ValueError, match="no feedforward module"):
        with_moa(TransformerLayerSubmodules(), BI)


def check_gate_of_an_expert_without_tokens() -> None:
    megatron()
    from moa_megatron.gates import gate_logits

    weight = torch.randn(14, 8, requires_grad=True)
    logits = gate_logits(torch.zeros(0, 8), weight)
    assert logits.shape == (0, 14) and logits.dtype == torch.float32
    logits.sum().backward()
    assert weight.grad is not None and not weight.grad.any()
    assert (
        gate_logits(torch.zeros(2, 8, dtype=torch.bfloat16), weight.bfloat16()).dtype
        == torch.float32
    )


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_specs(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
