"""Models on Transformer Engine: parameters, attributes and names in checkpoints. Nothing runs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from moa_megatron.config import MoAConfig
from tests.helpers import te, tiny
from tests.helpers.families import BI, FAMILIES, FIXED, model

NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
GATE = "decoder.layers.mlp.moa_gate.weight"


def check_dense_parameters() -> None:
    tiny.start()
    built = model("gpt", engine=True)
    shapes = {name: tuple(p.shape) for name, p in built.decoder.layers[1].named_parameters()}
    assert shapes == {
        "self_attention.linear_proj.weight": (32, 32),
        "self_attention.linear_qkv.layer_norm_weight": (32,),
        "self_attention.linear_qkv.weight": (96, 32),
        "pre_mlp_layernorm.weight": (32,),
        "mlp.linear_fc1.weight": (128, 32),
        "mlp.linear_fc2.weight": (32, 64),
        "mlp.moa_gate.weight": (14, 32),
    }
    norm = built.decoder.layers[1].pre_mlp_layernorm
    assert not norm.weight.sequence_parallel


def check_norm_is_marked_for_sequence_parallelism() -> None:
    tiny.start()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    from moa_megatron.layers import stateless_norm

    settings = tiny.config(tensor_model_parallel_size=2, sequence_parallel=True)
    norm = stateless_norm(TESpecProvider(), settings, 32)
    assert norm.weight.sequence_parallel, "its gradient is a sum over tensor-parallel ranks"
    assert list(norm.state_dict()) == ["weight"]
    norm.load_state_dict(norm.state_dict())
    fused = stateless_norm(TESpecProvider(), tiny.config(fused_residual_rmsnorm=True), 32)
    assert type(fused).__name__ == "TEFusedResidualRMSNorm"
    assert list(fused.state_dict()) == ["weight"]


def check_dense_names_agree() -> None:
    """Fused baseline, MoA with the norm taken out, and local modules save the same names."""
    tiny.start()
    for family, norm, gate in (
        ("gpt", NORM, GATE),
        ("hybrid", *(n.replace("layers.mlp", "layers.1.mlp") for n in (NORM, GATE))),
    ):
        baseline, ours, local = (
            tiny.saved_names(model(family, engine=engine, moa=moa))
            for engine, moa in ((True, FIXED), (True, BI), (False, BI))
        )
        assert norm in baseline
        assert ours - baseline == {gate} and not baseline - ours
        assert ours == local


def check_moe_names_agree() -> None:
    tiny.start()
    for family, norm in (
        ("gpt moe", "decoder.layers.pre_mlp_layernorm.weight"),
        ("hybrid moe", "decoder.layers.1.pre_mlp_layernorm.weight"),
    ):
        baseline = tiny.saved_names(model(family, engine=True, moa=FIXED))
        ours, local = (tiny.saved_names(model(family, engine=on)) for on in (True, False))
        assert norm in baseline and norm in ours
        assert {name.rsplit(".", 2)[1] for name in ours - baseline} == {"moa_gate"}
        assert not baseline - ours and ours == local


def check_grouped_and_sequential_names_agree() -> None:
    tiny.start()
    for family in ("gpt moe", "hybrid moe"):
        for scope in ("layer", "expert"):
            moa = MoAConfig(gate_scope=scope)  # type: ignore[arg-type]
            grouped, sequential = (
                tiny.saved_names(model(family, engine=True, moa=moa, moe_grouped_gemm=flag))
                for flag in (True, False)
            )
            assert grouped == sequential, (family, scope)


def check_no_state_of_norms_is_saved() -> None:
    """Loading stops at a missing entry, and a host has none for its norms."""
    tiny.start()
    for family in FAMILIES:
        ours = tiny.saved_states(model(family, engine=True))
        baseline = tiny.saved_states(model(family, engine=True, moa=FIXED))
        assert ours < baseline
        assert all("norm" in name for name in baseline - ours)
        assert not any("norm" in name for name in ours), "fused norms have no entry of their own"


def check_multi_token_prediction() -> None:
    tiny.start()
    from megatron.core.models.gpt import gpt_layer_specs as gpt

    from moa_megatron.models import engine_hybrid_stack_spec
    from moa_megatron.specs import with_moa

    settings = tiny.config(mtp_num_layers=1)
    layer = gpt.get_gpt_layer_with_transformer_engine_spec()
    mtp = gpt.get_gpt_mtp_block_spec(settings, layer, use_transformer_engine=True)
    names = tiny.saved_names(tiny.gpt(settings, with_moa(layer, BI), with_moa(mtp, BI)))
    inner = "mtp.layers.0.transformer_layer.mlp."
    for name in ("moa_gate.weight", "linear_fc1.layer_norm_weight"):
        assert inner + name in names, sorted(names)
    stack = with_moa(engine_hybrid_stack_spec(SimpleNamespace(moe_grouped_gemm=False)), BI)  # type: ignore[arg-type]
    names = tiny.saved_names(tiny.hybrid(tiny.config(mtp_num_layers=1), stack, "*-/*-"))
    for name in ("moa_gate.weight", "linear_fc1.layer_norm_weight"):
        assert any(n.startswith("mtp.") and n.endswith(f"mlp.{name}") for n in names), sorted(names)


def check_fc1_keeps_the_input_that_gates_keep() -> None:
    """Under fp8 fc1 would keep a quantised copy beside the input; not so where neither is kept."""
    tiny.start()

    def saves(select: Callable[[Any], Any], family: str = "gpt", **settings: Any) -> bool:
        layer = model(family, engine=True, num_layers=1, **settings).decoder.layers[0]
        return bool(select(layer.mlp).save_original_input)

    def dense(mlp: Any) -> Any:
        return mlp.linear_fc1

    def shared(mlp: Any) -> Any:
        return mlp.shared_experts.linear_fc1

    def expert(mlp: Any) -> Any:
        return mlp.experts.local_experts[0].linear_fc1

    fp8: dict[str, Any] = {"fp8": "e4m3", "fp8_recipe": "tensorwise"}
    assert not saves(dense)
    assert saves(dense, **fp8)
    assert not saves(dense, **fp8, moa=MoAConfig(mixing="la")), "scalars keep no input"
    assert not saves(dense, fp8="hybrid", fp8_recipe="delayed"), "Transformer Engine refuses it"
    for select, module in ((shared, "shared_experts"), (expert, "moe")):
        assert saves(select, "gpt moe", **fp8)
        recompute = {"recompute_granularity": "selective", "recompute_modules": [module]}
        assert not saves(select, "gpt moe", **fp8, **recompute)
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    assert not saves(dense, **fp8, **recompute)

    def grouped(mlp: Any) -> Any:
        return mlp.experts.linear_fc1

    moe: dict[str, Any] = {"family": "gpt moe", "moe_grouped_gemm": True}
    for recipe, expected in (("tensorwise", True), ("blockwise", True), ("delayed", False)):
        assert saves(grouped, fp8="e4m3", fp8_recipe=recipe, **moe) == expected, recipe
    assert not saves(grouped, fp8="e4m3", fp8_recipe="mxfp8", **moe), "it turns the product off"
    assert not saves(grouped, **moe)
    assert not saves(grouped, **fp8, **moe, moa=MoAConfig(mixing="la"))
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    assert not saves(grouped, **fp8, **moe, **recompute)


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return te.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_models(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
