"""The four families of models, tiny, on local modules or Transformer Engine's; their parameters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from moa_megatron.config import MoAConfig
from tests.helpers import tiny

FAMILIES = ("gpt", "hybrid", "gpt moe", "hybrid moe")
BI = MoAConfig()
FIXED = MoAConfig(mixing="fixed")


def model(family: str, *, engine: bool, moa: MoAConfig = BI, **settings: Any) -> Any:
    """A model as the entry point makes it: GPT or Hybrid, dense or MoE, on either modules."""
    from megatron.core.models.gpt import gpt_layer_specs as gpt

    from moa_megatron.layers import forget_norm_states, recompute_no_empty_mlps
    from moa_megatron.local_specs import local_hybrid_stack_spec
    from moa_megatron.models import engine_hybrid_stack_spec
    from moa_megatron.specs import with_moa

    moe = family.endswith("moe")
    values = (tiny.moe_config if moe else tiny.config)(**settings)
    if family.startswith("gpt"):
        experts = 4 if moe else None
        if engine:
            spec = gpt.get_gpt_layer_with_transformer_engine_spec(
                num_experts=experts, moe_grouped_gemm=settings.get("moe_grouped_gemm", False)
            )
        else:
            spec = gpt.get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm")
        built = tiny.gpt(values, with_moa(spec, moa))
    else:
        grouped = settings.get("moe_grouped_gemm", False)
        spec = (
            engine_hybrid_stack_spec(SimpleNamespace(moe_grouped_gemm=grouped))  # type: ignore[arg-type]
            if engine
            else local_hybrid_stack_spec()
        )
        built = tiny.hybrid(values, with_moa(spec, moa), "*E" if moe else "*-")
    recompute_no_empty_mlps([built])
    if moa.mixing != "fixed":
        forget_norm_states([built])
    return built


def assert_same(new: dict[str, Any], old: dict[str, Any]) -> None:
    import torch

    assert new.keys() == old.keys()
    different = [name for name in old if not torch.equal(new[name], old[name].to(new[name].dtype))]
    assert not different, different


def by_saved_name(built: Any) -> dict[str, Any]:
    """Parameters by their place in checkpoints: module names differ between norms in and out."""
    return {
        name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_").replace(
            "input_layernorm.", "self_attention.linear_qkv.layer_norm_"
        ): value
        for name, value in tiny.weights(built).items()
    }


def perturb(built: Any) -> Any:
    """Other values than initialisation gives, norms included."""
    import torch

    for parameter in built.parameters():
        torch.nn.init.normal_(parameter.data)
    return built
