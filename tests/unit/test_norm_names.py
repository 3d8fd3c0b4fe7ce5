"""Where checkpoints keep the norm in front of an FFN, on Megatron's local layers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moa_megatron.config import MoAConfig
from tests.helpers import isolated, tiny

DENSE_NAME = "mlp.linear_fc1.layer_norm_weight"
OWN_NAME = "pre_mlp_layernorm.weight"


def megatron() -> None:
    from moa_megatron import host, patches

    host.install()
    tiny.start()
    patches.apply()


def model(moa: MoAConfig, old_names: bool = False, **settings: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from moa_megatron.specs import with_moa

    values = tiny.moe_config(**settings)
    spec = get_gpt_decoder_block_spec(values, False, normalization="RMSNorm")
    return tiny.gpt(values, with_moa(spec, moa, old_names))


def norms(built: Any) -> set[str]:
    names = tiny.saved_names(built)
    return {name.removeprefix("decoder.layers.") for name in names if "layers" in name} & {
        f"{layer}{name}" for layer in ("", "0.", "1.") for name in (DENSE_NAME, OWN_NAME)
    }


def check_moe_layers_use_the_name_of_transformer_engine() -> None:
    megatron()
    assert norms(model(MoAConfig())) == {OWN_NAME}
    assert norms(model(MoAConfig(mixing="fixed"))) == {DENSE_NAME}, "upstream's own path"
    mixed = norms(model(MoAConfig(), moe_layer_freq=[0, 1]))
    assert mixed == {f"0.{DENSE_NAME}", f"1.{OWN_NAME}"}, "dense layers share the fused name"


def check_older_checkpoints_keep_their_names() -> None:
    megatron()
    import torch

    from moa_megatron.checkpoints import moe_norm_has_dense_name

    for old_names in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            saved = model(MoAConfig(), old_names)
            torch.nn.init.normal_(saved.decoder.layers[1].pre_mlp_layernorm.weight)
            tiny.save(saved, Path(folder, "iter_0000007"))
            Path(folder, "latest_checkpointed_iteration.txt").write_text("7")
            args: Any = SimpleNamespace(load=folder, ckpt_step=None, num_experts=4)
            assert moe_norm_has_dense_name(args) is old_names
            fresh = model(MoAConfig(), moe_norm_has_dense_name(args))
            tiny.load(fresh, Path(folder, "iter_0000007"))
            assert norms(fresh) == {DENSE_NAME if old_names else OWN_NAME}
        new, old = (m.decoder.layers[1].pre_mlp_layernorm.weight for m in (fresh, saved))
        assert torch.equal(new, old)


def check_without_a_checkpoint() -> None:
    megatron()
    from moa_megatron.checkpoints import moe_norm_has_dense_name

    with tempfile.TemporaryDirectory() as folder:
        for load, step, experts in (
            (None, None, 4),
            (folder, None, 4),
            (folder, 3, 4),
            (folder, None, None),
        ):
            args: Any = SimpleNamespace(load=load, ckpt_step=step, num_experts=experts)
            assert not moe_norm_has_dense_name(args)


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_norm_names(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
