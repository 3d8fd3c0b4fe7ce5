"""Mixtures beside Mamba layers of HybridModel, on a host that poses as a GPU."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from moa_megatron.config import MoAConfig
from tests.helpers import isolated, te, tiny

PATTERN = "M*-ME"
WIDTHS = {
    **{"mamba_state_dim": 16, "mamba_head_dim": 8, "mamba_num_heads": 16, "mamba_num_groups": 1},
    **{"moe_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 32},
    "num_layers": len(PATTERN),
}


def built(moa: MoAConfig, **settings: Any) -> Any:
    """On the GPU; three sorts of layers of upstream's around a dense FFN and experts."""
    import torch

    from moa_megatron.models import engine_hybrid_stack_spec
    from moa_megatron.specs import with_moa

    spec: Any = engine_hybrid_stack_spec(SimpleNamespace(moe_grouped_gemm=True))  # type: ignore[arg-type]
    numbers = {"bf16": False, "params_dtype": torch.float32}
    still = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    values = tiny.moe_config(**WIDTHS, **numbers, **still, moe_grouped_gemm=True, **settings)
    torch.manual_seed(11)
    return tiny.hybrid(values, with_moa(spec, moa), PATTERN).cuda()


def gradients(model: Any) -> dict[str, Any]:
    import torch

    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(3)).cuda()
    positions = torch.arange(16, device="cuda").expand(2, -1)
    model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).float().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def start() -> None:
    import torch

    from tests.fake_gpu import mamba_ssm

    assert torch.cuda.is_available()
    mamba_ssm.install()
    tiny.start()


def check_every_layer_trains() -> None:
    start()
    import torch
    from megatron.core.ssm.mamba_layer import MambaLayer

    from moa_megatron.mlp import MoAMLP

    moa, passes = MoAConfig(variant="qd", gate_init_std=0.3), []
    models = [built(moa), built(moa, fp8="hybrid", fp8_recipe="tensorwise")]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        layers = model.decoder.layers
        assert [isinstance(layer, MambaLayer) for layer in layers] == [s == "M" for s in PATTERN]
        assert isinstance(layers[2].mlp, MoAMLP)
        found = gradients(model)
        gates = [name for name in found if "moa_gate" in name]
        assert len(gates) == 2, gates
        dead = [name for name, grad in found.items() if grad is None or not grad.any()]
        assert not dead and all(grad.isfinite().all() for grad in found.values()), dead
        passes.append(torch.cat([grad.flatten() for grad in found.values()]))
    plain, eight_bits = passes
    assert 1e-3 < (eight_bits - plain).norm() / plain.norm() < 0.4


def check_a_mixture_of_one_function_is_the_baseline() -> None:
    """The identity alone, its coefficient 1, is SwiGLU: gradients are those of upstream's model."""
    start()
    import torch

    one = MoAConfig(mixing="la", dictionary=("id",), variant="one")
    baseline, model = built(MoAConfig(mixing="fixed")), built(one)
    model.load_state_dict(baseline.state_dict(), strict=False)  # norms are ones in both
    for name, parameter in model.named_parameters():
        if "moa_gate" in name:
            parameter.data.fill_(1.0)
    wanted, found = gradients(baseline), gradients(model)
    found["decoder.layers.2.mlp.linear_fc1.layer_norm_weight"] = found.pop(
        "decoder.layers.2.pre_mlp_layernorm.weight"
    )
    assert {name for name in found if "moa_gate" not in name} == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-7, msg=name)


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS, variables={**os.environ, **te.fake_gpu()})


@pytest.mark.parametrize("name", CHECKS)
def test_mamba(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
