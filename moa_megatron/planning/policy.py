"""What is policy and not law: advice against layouts, and the time of a step."""

from __future__ import annotations

import argparse

from moa_megatron import costs
from moa_megatron.costs.gpus import assumed_mfu
from moa_megatron.layout import Layout
from moa_megatron.planning.model import Cluster, Model

LONG_SEQUENCE = 8192
"""Context parallelism splits only longer sequences: below, its exchanges cost more than they save
(advice of Megatron's MoE guide)."""


def advice(args: argparse.Namespace, place: Layout, cluster: Cluster) -> tuple[str, ...]:
    """Why a legal layout is not a good one: topology and policy."""
    found, node = [], cluster.gpus_per_node
    if place.tp * place.cp > node and place.tp > 1:
        found.append(f"tensor and context parallelism leave the node of {node} GPUs")
    if place.ep * place.etp > node:
        found.append(f"experts are exchanged between nodes: EP x ETP exceeds {node} GPUs")
    if place.cp > 1 and args.seq_length < LONG_SEQUENCE:
        found.append(f"context parallelism for sequences below {LONG_SEQUENCE}")
    if place.pp > 1 and place.world_size <= node:
        found.append("pipeline stages within a node: idle time that tensor parallelism has not")
    return tuple(found)


def step_seconds(model: Model, cluster: Cluster, place: Layout, args: argparse.Namespace) -> float:
    """Predicted time of a step: model FLOPs over peak rate and MFU.

    A measured MFU already holds what its layout costs. To the assumed one are added recomputed
    FLOPs and the idle share of the pipeline, (pp - 1) / (micro-batches x vpp) of a step.
    """
    flops, fp8 = model.flops(), bool(args.fp8)
    work = flops.model * model.step_tokens
    mfu = cluster.mfu
    if mfu is None:
        mfu = assumed_mfu(cluster.gpu, bool(args.num_experts), fp8)
        work *= 1 + recomputed(flops, args) / flops.training
        count = args.global_batch_size // (args.micro_batch_size * place.dp)
        work *= 1 + (place.pp - 1) / (count * place.vpp)
    return float(work / (cluster.gpus * cluster.gpu.peak(fp8) * mfu))


def recomputed(flops: costs.Flops, args: argparse.Namespace) -> float:
    """FLOPs of a token that the backward pass repeats, apart from norms and activations."""
    if args.recompute_granularity == "full":
        return flops.forward - flops.head - flops.prediction
    modules = set(args.recompute_modules or ["core_attn"])
    if args.recompute_granularity != "selective":
        return 0.0
    found = flops.attention if "core_attn" in modules else 0.0
    if modules & {"mlp", "moe"}:
        found += flops.ffn + flops.gates + flops.mixture + flops.router
    return found
