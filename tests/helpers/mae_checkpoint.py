"""Runs of masked autoencoders as Megatron saves them, made by hand."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp

from moa_megatron.config import MoAConfig
from moa_megatron.vision.reference import MAEShape

_STACKS = ("encoder.layers.", "decoder.layers.")


def write_run(run: Path, state: dict[str, Tensor], args: argparse.Namespace, step: int = 7) -> Path:
    """A run folder with one checkpoint of `state`; layers are stacked, as Megatron does it."""
    folder = run / "checkpoints" / f"iter_{step:07d}"
    common = io.BytesIO()
    torch.save([{"args": args, "iteration": step}], common)
    common.seek(0)
    content: dict[str, Any] = {
        **stacked(state),
        "optimizer.state.exp_avg.encoder.layers.mlp.linear_fc1.weight": torch.zeros(2, 3),
        "encoder.layers.mlp.linear_fc1._extra_state/shard_0_2": io.BytesIO(b"none"),
        "common_state/shard_0_1": common,
    }
    dcp.save(content, checkpoint_id=folder, no_dist=True)
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backend))
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step))
    return run


def stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of equal layers as one, with a leading axis."""
    whole: dict[str, Any] = {}
    for name, tensor in state.items():
        if not name.startswith(_STACKS):
            whole[name] = tensor
            continue
        stack, _, rest = name.partition(".layers.")
        whole.setdefault(f"{stack}.layers.{rest.partition('.')[2]}", []).append(tensor)
    return {
        name: torch.stack(value) if isinstance(value, list) else value
        for name, value in whole.items()
    }


def namespace(shape: MAEShape, moa: MoAConfig, **others: Any) -> argparse.Namespace:
    """Megatron's arguments of a run, as far as reading it back needs them."""
    return argparse.Namespace(
        moa_model="mae", moa_mixing=moa.mixing, moa_variant=moa.variant, moa_gate=moa.gate,
        moa_dictionary=moa.dictionary, moa_gate_scope=moa.gate_scope, moa_backend=moa.backend,
        moa_leaky_slope=moa.leaky_slope, moa_gate_init_std=moa.gate_init_std,
        img_h=shape.image[0], img_w=shape.image[1], patch_dim=shape.patch,
        num_channels=shape.channels, hidden_size=shape.width, num_layers=shape.layers,
        num_attention_heads=shape.heads, ffn_hidden_size=shape.ffn,
        mae_decoder_width=shape.decoder_width, mae_decoder_layers=shape.decoder_layers,
        mae_decoder_heads=shape.decoder_heads, mae_decoder_ffn=shape.decoder_ffn,
        layernorm_epsilon=shape.eps, add_bias_linear=shape.bias, normalization="LayerNorm",
        layernorm_zero_centered_gamma=False, init_method_std=0.02, mae_eval_crop=1.0,
        mae_pixel_mean=list(shape.pixel_mean), mae_pixel_std=list(shape.pixel_std),
        moa_grey_images=False, moa_max_bad_images=0.1,
        swiglu=moa.mixing == "fixed" or moa.gated, **others,
    )  # fmt: skip
