"""``with_moa`` on Transformer Engine's specifications: what it exchanges, shares, and refuses."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest

from moa_megatron.config import MoAConfig
from tests.helpers import te, tiny
from tests.unit.test_specs import MOA_NAMES, MOE_NAMES, found

BI = MoAConfig()
NORM_MAP = ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def engine_layer(**options: Any) -> Any:
    from megatron.core.models.gpt import gpt_layer_specs

    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**options)


def exchanged(spec: Any) -> Any:
    from moa_megatron.specs import with_moa

    return with_moa(spec, BI)


def own_norm(layer: Any) -> bool:
    """Whether a layer has the norm that fc1 held, and a plain fc1."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    from moa_megatron.layers import stateless_norm

    norm, fc1 = layer.pre_mlp_layernorm, layer.mlp.keywords["submodules"].linear_fc1
    return (
        isinstance(norm, partial) and norm.func is stateless_norm and fc1 is TEColumnParallelLinear
    )


def check_dense_layer_gets_its_own_norm() -> None:
    tiny.start()
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer

    spec = engine_layer()
    ours = exchanged(spec)
    assert ours.module is TransformerLayer, "upstream's MTP asks for this very class"
    assert own_norm(ours.submodules)
    assert NORM_MAP in ours.submodules.sharded_state_dict_keys_map.items()
    old, new = (s.sharded_state_dict_keys_map for s in (spec.submodules, ours.submodules))
    assert old.items() < new.items(), "upstream's own names stay"
    assert found(spec.submodules.mlp) == ["MLP"] and found(ours.submodules.mlp) == ["MoAMLP"]
    assert spec.submodules.pre_mlp_layernorm is IdentityOp, "the specification itself must stay"
    fc1 = spec.submodules.mlp.keywords["submodules"].linear_fc1
    assert fc1 is TELayerNormColumnParallelLinear
    assert ours.submodules.self_attention is spec.submodules.self_attention
    params = spec.submodules.mlp.keywords
    old_style = dataclasses.replace(spec.submodules, mlp=ModuleSpec(MLP, {}, params["submodules"]))
    assert own_norm(exchanged(old_style)) and found(exchanged(old_style).mlp) == ["MoAMLP"]


def check_latent_attention_layer() -> None:
    tiny.start()
    ours = exchanged(engine_layer(multi_latent_attention=True)).submodules
    assert own_norm(ours) and dict([NORM_MAP]) == ours.sharded_state_dict_keys_map


def check_sequential_experts() -> None:
    tiny.start()
    spec = engine_layer(num_experts=4)
    assert found(spec.submodules.mlp) == MOE_NAMES
    ours = exchanged(spec).submodules
    assert found(ours.mlp) == MOA_NAMES
    assert ours.pre_mlp_layernorm is spec.submodules.pre_mlp_layernorm, "MoE layers have a norm"
    assert NORM_MAP[0] not in ours.sharded_state_dict_keys_map


def check_grouped_experts() -> None:
    tiny.start()
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    names = ["MoALayer", "MoATEGroupedMLP", "build_shared_experts"]
    spec = engine_layer(num_experts=4, moe_grouped_gemm=True)
    assert found(exchanged(spec).submodules.mlp) == names
    ours = exchanged(hybrid_stack_spec).submodules
    assert found(ours.moe_layer.submodules.mlp) == names
    assert found(hybrid_stack_spec.submodules.moe_layer.submodules.mlp)[0] == "MoELayer"


def check_blocks_of_virtual_stages() -> None:
    tiny.start()
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    settings = tiny.moe_config(
        num_layers=8,
        moe_layer_freq=[0, 0, 1, 1, 0, 0, 0, 1],
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_dtype=torch.bfloat16,
    )
    for stage, kinds in ((0, ["MoAMLP", "MoAMLP"]), (1, ["MoAMLP", "MoAMLP"])):
        block = get_gpt_decoder_block_spec(settings, True, "RMSNorm", vp_stage=stage, pp_rank=0)
        ours = exchanged(block)
        assert [found(layer.submodules.mlp)[0] for layer in ours.layer_specs] == kinds
        assert ours.layer_specs[0] is ours.layer_specs[1], "a layer met twice is rebuilt once"
        assert all(own_norm(layer.submodules) for layer in ours.layer_specs)
        assert ours.layer_norm is block.layer_norm
    last = get_gpt_decoder_block_spec(settings, True, "RMSNorm", vp_stage=1, pp_rank=1)
    assert [found(s.submodules.mlp)[0] for s in exchanged(last).layer_specs] == [
        "MoAMLP",
        "MoALayer",
    ]


def check_multi_token_prediction_of_gpt() -> None:
    tiny.start()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    settings = tiny.config(mtp_num_layers=1)
    mtp = get_gpt_mtp_block_spec(settings, engine_layer(), use_transformer_engine=True)
    assert mtp is not None
    inner = exchanged(mtp).layer_specs[0].submodules.mtp_model_layer.submodules
    assert own_norm(inner) and found(inner.mlp) == ["MoAMLP"]


def check_hybrid_stack() -> None:
    tiny.start()
    from types import SimpleNamespace

    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    from moa_megatron.models import engine_hybrid_stack_spec

    assert engine_hybrid_stack_spec(SimpleNamespace(moe_grouped_gemm=True)) is hybrid_stack_spec
    spec = engine_hybrid_stack_spec(SimpleNamespace(moe_grouped_gemm=False))
    assert found(spec.submodules.moe_layer) == MOE_NAMES
    before, ours = hybrid_stack_spec.submodules, exchanged(spec).submodules
    for name in ("mamba_layer", "gdn_layer", "attention_layer", "dsa_layer", "mla_layer"):
        assert getattr(ours, name) is getattr(before, name), name
    assert ours.mtp_block_spec is before.mtp_block_spec, "it builds on the exchanged layers"
    assert own_norm(ours.mlp_layer.submodules)
    assert dict([NORM_MAP]) == ours.mlp_layer.submodules.sharded_state_dict_keys_map
    assert found(ours.moe_layer) == MOA_NAMES
    assert not before.mlp_layer.submodules.sharded_state_dict_keys_map
    assert found(before.mlp_layer) == ["MLP"], "the module-level specification must stay"


def check_refused_modules_are_named_with_the_cure() -> None:
    tiny.start()
    from megatron.core.extensions.transformer_engine import TEFusedMLP
    from megatron.core.models.gpt.moe_module_specs import get_inference_optimized_moe_spec
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.shared_experts import FusedSharedExpertMLP
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    for mlp, message in (
        (
            engine_layer(use_te_op_fuser=True).submodules.mlp,
            "leave --use-transformer-engine-op-fus",
        ),
        (partial(TEFusedMLP.as_mlp_submodule, submodules=MLPSubmodules(int, int)), "TEFusedMLP"),
        (partial(FusedSharedExpertMLP), "leave --use-grouped-gemm-for-shared-expert out"),
        (
            get_inference_optimized_moe_spec(),
            "InferenceGroupedMLP .* train with",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            exchanged(TransformerLayerSubmodules(mlp=mlp))


def check_no_norm_can_stay_between_input_and_gates() -> None:
    tiny.start()
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.tensor_parallel import InferenceLayerNormColumnParallelLinear

    from moa_megatron.mlp import MoAMLP

    layer = engine_layer().submodules
    fused = layer.mlp.keywords["submodules"]
    inference = dataclasses.replace(fused, linear_fc1=InferenceLayerNormColumnParallelLinear)
    other = partial(layer.mlp.func, submodules=inference)
    for node in (
        layer.mlp,  # without its layer nobody can put a norm in front
        dataclasses.replace(layer, pre_mlp_layernorm=TENorm),
        dataclasses.replace(layer, mlp=other),
        [
            partial(
                layer.mlp.func,
                submodules=dataclasses.replace(fused, linear_fc1=partial(fused.linear_fc1)),
            )
        ],
    ):
        with pytest.raises(ValueError, match="normalises the FFN input where gates cannot see it"):
            exchanged(node)
    group = parallel_state.get_tensor_model_parallel_group()
    with pytest.raises(ValueError, match="fc1 is TELayerNormColumnParallelLinear"):
        MoAMLP(tiny.config(), fused, tp_group=group, moa=BI)


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return te.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_te_specs(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
