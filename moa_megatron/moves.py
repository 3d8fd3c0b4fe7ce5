"""Checkpoints that start another model than the one that they hold.

Weights of a GPTModel go into a HybridModel of the same blocks, and a baseline's weights into a
mixture. Everything else must be the model that was saved (``checkpoints.differences``).
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

from moa_megatron.config import MoAConfig, moa_config_from_args

logger = logging.getLogger(__name__)
# Megatron then names the tensors that the checkpoint lacks, and leaves them as initialised.
_LENIENT = "log_unexpected"
_STRICT = "assume_ok_unexpected"  # Megatron's default


def saved_moa(saved: Any) -> MoAConfig:
    """Settings in a checkpoint's arguments; a fixed activation where plain Megatron wrote it."""
    if hasattr(saved, "moa_mixing"):
        return moa_config_from_args(saved)
    return MoAConfig(mixing="fixed")


def to_hybrid(args: argparse.Namespace, saved: Any) -> bool:
    """Whether a GPTModel's checkpoint is loaded into a HybridModel of the same blocks.

    Megatron reads the one for the other, optimiser state included, where every block has one kind
    of feedforward layer (``megatron.core.dist_checkpointing.gpt_checkpoint_interop``).
    """
    from megatron.core.dist_checkpointing.gpt_checkpoint_interop import gpt_compatible_layer_maps

    other = getattr(saved, "moa_model", "gpt") != "gpt"
    if args.moa_model != "hybrid" or other or getattr(saved, "hybrid_layer_pattern", None):
        return False
    pattern = args.hybrid_layer_pattern
    try:
        blocks = gpt_compatible_layer_maps(pattern).num_gpt_layers
    except ValueError:
        return False
    experts = [int(bool(saved.num_experts))] * saved.num_layers
    if saved.num_experts and isinstance(saved.moe_layer_freq, list):
        experts = saved.moe_layer_freq
    elif saved.num_experts and saved.moe_layer_freq != 1:
        return False
    return blocks == saved.num_layers and experts == [int("E" in pattern)] * blocks


def starts_gates(args: argparse.Namespace, saved: Any) -> bool:
    """Whether ``--finetune`` starts a mixture from the weights of a fixed activation."""
    mixing = moa_config_from_args(args).mixing
    return bool(args.finetune) and saved_moa(saved).mixing == "fixed" and mixing != "fixed"


def prepare(args: argparse.Namespace, saved: Any) -> None:
    """Says what is moved, and lets Megatron load a checkpoint without gates into one with them."""
    if to_hybrid(args, saved):
        logger.info("%s holds a GPTModel: its blocks go into a HybridModel", args.load)
    if starts_gates(args, saved):
        if args.dist_ckpt_strictness == _STRICT:
            args.dist_ckpt_strictness = _LENIENT
        logger.info(
            "%s holds no gates: they start as initialised, so the model starts from the baseline's "
            "weights but not from its loss; Megatron names the tensors it does not find",
            args.load,
        )
