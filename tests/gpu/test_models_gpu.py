"""Whole models on one GPU: Transformer Engine's modules against local ones, recomputation, FP8.

Each half runs in a process of its own. The local one also runs on a host, where it holds this file
itself to account: what compares there compares on a GPU.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from moa_megatron.config import MoAConfig
from tests.helpers import isolated, tiny
from tools.benchmarks import ffn, grouped

FAMILIES = ("gpt", "hybrid", "gpt moe", "hybrid moe")
CUDA = torch.cuda.is_available()
MODULES = os.environ.get("MOA_TEST_MODULES", "local")
MOA = MoAConfig(variant="qd", gate_init_std=0.3)
SIZES = {
    **{"hidden_size": 128, "ffn_hidden_size": 256, "hidden_dropout": 0.0},
    **{"attention_dropout": 0.0, "masked_softmax_fusion": False},
}
MOE = {"moe_ffn_hidden_size": 64, "moe_shared_expert_intermediate_size": 96}
# Transformer Engine multiplies float32 in TF32, ten bits of fraction.
TF32 = 1e-2
Values = dict[str, torch.Tensor]


def built(family: str, engine: bool, bf16: bool = True, **settings: Any) -> Any:
    """A tiny model, on the GPU where there is one."""
    from megatron.core.transformer.enums import AttnBackend

    from tests.te.test_te_models import model

    values = {**SIZES, **(MOE if family.endswith("moe") else {}), **settings}
    values |= {"params_dtype": torch.bfloat16 if bf16 else torch.float32, "bf16": bf16}
    # Flash attention adds up in an order of its own.
    values["attention_backend"] = AttnBackend.unfused
    made = model(family, engine=engine, moa=MOA, **values)
    return made.cuda() if CUDA else made


def loss_and_gradients(made: Any) -> Values:
    """Of one batch, gradients under the names that modules have in either implementation."""
    generator = torch.Generator().manual_seed(5)
    batch = torch.randint(64, (4, 17), generator=generator).to(next(made.parameters()).device)
    positions = torch.arange(16, device=batch.device).expand(4, -1)
    made.zero_grad(set_to_none=True)
    loss = made(batch[:, :-1], positions, None, labels=batch[:, 1:]).float().mean()
    loss.backward()
    found = {name: p.grad.detach().clone() for name, p in made.named_parameters()}
    return {"loss": loss.detach(), **found}


def saved_names(values: Values) -> Values:
    """Norms lie within linear layers on Transformer Engine, before them elsewhere."""
    return {
        name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_"): value
        for name, value in values.items()
    }


def worst(found: Values, wanted: Values) -> tuple[str, float]:
    """Largest relative RMS difference, and whose."""
    from tests.helpers.numerics import rms_error

    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    errors = {name: rms_error(found[name], value) for name, value in wanted.items()}
    name = max(errors, key=lambda key: errors[key])
    print(f"largest difference: {name} {errors[name]:.1e}")
    return name, errors[name]


def check_engine_equals_local() -> None:
    """From one checkpoint, written by local modules."""
    with ffn.megatron(_device()):
        for family in FAMILIES:
            local = built(family, False, bf16=False)
            other = built(family, MODULES == "engine", bf16=False)
            with tempfile.TemporaryDirectory() as folder:
                tiny.save(local, Path(folder, "checkpoint"))
                tiny.load(other, Path(folder, "checkpoint"))
            found, wanted = (saved_names(loss_and_gradients(each)) for each in (other, local))
            name, error = worst(found, wanted)
            assert error <= TF32, (family, name, error)
            assert any("moa_gate" in key for key in wanted)


def _other_ways(family: str) -> dict[str, dict[str, Any]]:
    """Recomputation, and shared experts on a stream of their own."""
    whole = {"recompute_method": "uniform", "recompute_num_layers": 1}
    names = ["layernorm"]
    names += ["moe", "shared_experts", "moe_act"] if family.endswith("moe") else ["mlp"]
    chosen = {
        name: {"recompute_granularity": "selective", "recompute_modules": [name]} for name in names
    }
    found = {"full": {"recompute_granularity": "full", **whole}, **chosen}
    if family.endswith("moe"):
        found["overlap"] = {"moe_shared_expert_overlap": True}
    return found


def check_recomputation_and_overlap_change_nothing() -> None:
    """In float32: in bfloat16 two gradients added in another order differ by 6e-3 already."""
    with ffn.megatron(_device()):
        for family in FAMILIES:
            grouped_experts = {"moe_grouped_gemm": True} if family.endswith("moe") else {}
            plain = built(family, MODULES == "engine", bf16=False, **grouped_experts)
            wanted = loss_and_gradients(plain)
            for name, settings in _other_ways(family).items():
                settings |= grouped_experts
                other = built(family, MODULES == "engine", bf16=False, **settings)
                other.load_state_dict(plain.state_dict())
                parameter, error = worst(loss_and_gradients(other), wanted)
                assert error <= 1e-4, (family, name, parameter, error)


def check_wrong_gradients_are_seen() -> None:
    with ffn.megatron(_device()):
        values = loss_and_gradients(built("gpt moe", MODULES == "engine"))
        gate = next(name for name in values if "moa_gate" in name)
        assert worst({**values, gate: values[gate] * 1.02}, values)[1] > TF32
        again = loss_and_gradients(built("gpt moe", MODULES == "engine", init_method_std=0.021))
        assert _whole_error(again, values) > 0.4


def check_fp8_trains_every_parameter() -> None:
    if MODULES != "engine":
        return
    with ffn.megatron(_device()):
        for family in FAMILIES:
            more = {"moe_grouped_gemm": True} if family.endswith("moe") else {}
            plain = built(family, True, **more)
            wanted = loss_and_gradients(plain)
            for recipe in grouped.recipes():
                settings = {"fp8": grouped.FP8[recipe], "fp8_recipe": recipe}
                other = built(family, True, **more, **settings)
                other.load_state_dict(plain.state_dict())
                for _ in range(3):  # delayed scaling looks at the steps before
                    values = loss_and_gradients(other)
                error = _whole_error(values, wanted)
                print(family, recipe, error)
                # Eight bits; weights that are not the same ones give more than 1.
                assert 1e-3 < error < 0.4, (family, recipe, error)
                dead = [n for n, v in values.items() if not v.isfinite().all() or not v.any()]
                assert not dead, (family, recipe, dead)


def _whole_error(found: Values, wanted: Values) -> float:
    """Relative RMS difference of all gradients as one vector: small ones may be mere noise."""
    from tests.helpers.numerics import rms_error

    names = [name for name in wanted if name != "loss"]
    one, other = (torch.cat([v[n].double().flatten() for n in names]) for v in (found, wanted))
    return rms_error(one, other)


def _device() -> torch.device:
    return torch.device("cuda" if CUDA else "cpu")


CHECKS = [name for name in globals() if name.startswith("check_")]


def _outcomes(modules: str) -> dict[str, str]:
    visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    variables = {"MOA_TEST_MODULES": modules, **(visible if CUDA else {})}
    return isolated.outcomes(__file__, CHECKS, variables=variables)


@pytest.fixture(scope="module")
def local() -> dict[str, str]:
    return _outcomes("local")


@pytest.fixture(scope="module")
def engine() -> dict[str, str]:
    return _outcomes("engine")


@pytest.mark.parametrize("name", [name for name in CHECKS if "fp8" not in name])
def test_local_modules(local: dict[str, str], name: str) -> None:
    assert not local[name], local[name]


@pytest.mark.gpu
@pytest.mark.skipif(not grouped.has_engine(), reason="needs Transformer Engine on a GPU")
@pytest.mark.parametrize("name", CHECKS)
def test_transformer_engine(engine: dict[str, str], name: str) -> None:
    assert not engine[name], engine[name]
