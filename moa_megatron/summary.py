"""The readable start of a run: model, layout, data, length and where to look."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from moa_megatron import budget, costs, host
from moa_megatron.config import MoAConfig


def lines(args: argparse.Namespace, moa: MoAConfig, data: str, folder: Path) -> list[str]:
    """What the terminal shows before training.

    Args:
        args: Megatron's namespace after validation.
        moa: settings of the method.
        data: what is read, in words.
        folder: of the run.
    """
    device = "host CPU, gloo" if host.active() else torch.cuda.get_device_name()
    sizes = (
        ("TP", args.tensor_model_parallel_size),
        ("PP", args.pipeline_model_parallel_size),
        ("CP", args.context_parallel_size),
        ("EP", args.expert_model_parallel_size),
        ("DP", args.data_parallel_size),
    )
    layout = " x ".join(f"{name} {size}" for name, size in sizes if size > 1) or "one process"
    start = f"continues from {args.load}" if args.load else "starts at step 0"
    images = args.moa_model == "mae"
    model, parameters = _images_model(args, moa) if images else _language_model(args, moa)
    length = _images_length(args) if images else _tokens_length(args)
    return [
        f"moa-megatron: {args.moa_recipe}, {describe(moa)}",
        f"  model        {model}",
        f"  parameters   {parameters}",
        f"  numbers      {numbers(args)}",
        f"  layout       {args.world_size} on {device}: {layout}",
        f"  data         {data}",
        f"  training     {length}; {args.optimizer}, peak lr {args.lr}; {start}",
        f"  run folder   {folder}",
        f"  watch        tensorboard --logdir {args.tensorboard_dir}",
    ]


def numbers(args: argparse.Namespace) -> str:
    """The number format of products: ``bf16, FP8 hybrid with blockwise scales``."""
    name = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    return f"{name}, FP8 {args.fp8} with {args.fp8_recipe} scales" if args.fp8 else name


def describe(moa: MoAConfig) -> str:
    """The method in a few words: ``MoA bi, 7 activations, sigmoid gates``."""
    if moa.mixing == "fixed":
        return "fixed activation (baseline)"
    words = f"{moa.mixing.upper() if moa.mixing == 'la' else 'MoA'} {moa.variant}"
    gates = f", {moa.gate} gates" if moa.mixing == "moa" else ""
    return f"{words}, {len(moa.names)} activations{gates}"


def _language_model(args: argparse.Namespace, moa: MoAConfig) -> tuple[str, str]:
    count = costs.parameters(args, moa, args.padded_vocab_size or 0)
    share = f"{count.gates:,} of them gates ({count.gates / count.total:.2%})"
    if args.padded_vocab_size is None:
        share += ", without embeddings"
    name = "GPTModel" if args.moa_model == "gpt" else "HybridModel"
    depth = getattr(args, "moa_num_blocks", None) or args.num_layers
    experts = f", {args.num_experts} experts top-{args.moe_router_topk}" if args.num_experts else ""
    model = f"{name}, {depth} blocks, width {args.hidden_size}{experts}"
    return model, f"{count.total:,}, active {count.active:,}, {share}"


def _tokens_length(args: argparse.Namespace) -> str:
    tokens = args.global_batch_size * args.seq_length
    samples = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    unit = "samples" if args.train_samples else f"steps of {tokens:,} tokens"
    length = f"{args.train_samples or args.train_iters} {unit}"
    return f"{length}, {budget.short(samples * args.seq_length)} tokens in all"


def _images_model(args: argparse.Namespace, moa: MoAConfig) -> tuple[str, str]:
    count = costs.parameters(args, moa, 0)
    model = (
        f"masked autoencoder, {args.num_layers} blocks of width {args.hidden_size}, decoder "
        f"{args.mae_decoder_layers} of {args.mae_decoder_width}; {args.mae_mask_ratio:.0%} of "
        f"{args.seq_length - 1} patches hidden"
    )
    share = f"{count.gates:,} of them gates ({count.gates / count.total:.2%})"
    return model, f"{count.total:,}, encoder {count.active:,}, {share}"


def _images_length(args: argparse.Namespace) -> str:
    length = f"{args.train_iters} steps of {args.global_batch_size:,} images"
    if not getattr(args, "moa_image_count", None):
        return length
    epochs = args.train_iters * args.global_batch_size / args.moa_image_count
    return f"{length}, {epochs:.4g} epochs"
