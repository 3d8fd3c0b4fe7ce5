"""A masked autoencoder small enough for every test, and its weights under Megatron's names."""

from __future__ import annotations

import torch
from torch import Tensor

from moa_megatron.config import MoAConfig
from moa_megatron.vision.reference import MAEShape

SHAPE = MAEShape(
    image=(8, 12), patch=4, width=16, layers=2, heads=2, ffn=24,
    decoder_width=8, decoder_layers=2, decoder_heads=2, decoder_ffn=20,
    pixel_mean=(0.5, 0.4, 0.3), pixel_std=(0.25, 0.5, 0.75),
)  # fmt: skip
VARIANTS = (
    MoAConfig(mixing="fixed"),
    MoAConfig(mixing="la", variant="one"),
    MoAConfig(variant="type1"),
    MoAConfig(variant="one"),
    MoAConfig(variant="bi"),
    MoAConfig(variant="qd", gate="softmax"),
)


def megatron_state(shape: MAEShape, moa: MoAConfig, fused_norms: bool = False) -> dict[str, Tensor]:
    """Random weights as `moa_megatron.vision.model` names them.

    `fused_norms` gives norms the names they are saved under.
    """
    d, dd = shape.width, shape.decoder_width
    state = {
        "patch_embedding.weight": torch.randn(d, shape.patch_values),
        "patch_embedding.bias": torch.randn(d),
        "class_token": torch.randn(d),
        "mask_token": torch.randn(dd),
        "decoder_embedding.weight": torch.randn(dd, d),
        "decoder_embedding.bias": torch.randn(dd),
        "head.weight": torch.randn(shape.patch_values, dd),
        "head.bias": torch.randn(shape.patch_values),
    }
    stacks = {
        "encoder": (d, shape.ffn, shape.layers),
        "decoder": (dd, shape.decoder_ffn, shape.decoder_layers),
    }
    norms = ["input_layernorm.", "pre_mlp_layernorm."]
    if fused_norms:
        norms = ["self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_"]
    for stack, (width, ffn, layers) in stacks.items():
        up = ffn if moa.mixing != "fixed" and not moa.gated else 2 * ffn
        for kind in ("weight", "bias"):
            state[f"{stack}.final_layernorm.{kind}"] = torch.randn(width)
        for index in range(layers):
            layer = f"{stack}.layers.{index}."
            sizes = {
                "self_attention.linear_qkv.": (3 * width, width),
                "self_attention.linear_proj.": (width, width),
                "mlp.linear_fc1.": (up, width),
                "mlp.linear_fc2.": (width, ffn),
            }
            for name, size in sizes.items():
                state[f"{layer}{name}weight"] = torch.randn(*size)
                state[f"{layer}{name}bias"] = torch.randn(size[0])
            for name in norms:
                state[f"{layer}{name}weight"] = torch.randn(width)
                state[f"{layer}{name}bias"] = torch.randn(width)
            if moa.mixing != "fixed":
                n = moa.num_coefficients
                gate = torch.randn(n) if moa.mixing == "la" else torch.randn(n, width)
                state[f"{layer}mlp.moa_gate.weight"] = gate
    return state
