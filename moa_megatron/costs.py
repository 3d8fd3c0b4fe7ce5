"""Parameters of a model from its arguments: one source for log lines, planner and tests.

Formulas of the method paper, section 5 and appendix A.1, held against models that Megatron builds
(tests/unit/test_costs.py).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from moa_megatron.config import MoAConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: ``active`` ones serve one token, ``gates`` are part of ``total``."""

    total: int
    active: int
    gates: int


def parameters(args: argparse.Namespace, moa: MoAConfig, vocab_size: int) -> Parameters:
    """Parameters of the model that ``args`` describe.

    Args:
        args: Megatron's namespace.
        moa: settings of the method.
        vocab_size: rows of the embedding, padding included.
    """
    blocks = _blocks(args)
    total = active = gates = 0
    for is_moe in blocks:
        ffn = _moe(args, moa) if is_moe else _dense(args, moa)
        total += ffn.total + _attention(args)
        active += ffn.active + _attention(args)
        gates += ffn.gates
    depths = args.mtp_num_layers or 0
    if depths:
        # A depth of multi-token prediction: projection of 2d to d, three norms, one more block.
        d = args.hidden_size
        ffn = _moe(args, moa) if blocks[-1] else _dense(args, moa)
        extra = 2 * d * d + 3 * _norm(args) + _attention(args)
        total += depths * (extra + ffn.total)
        active += depths * (extra + ffn.active)
        gates += depths * ffn.gates
    matrices = 2 if args.untie_embeddings_and_output_weights else 1
    ends = matrices * vocab_size * args.hidden_size + _norm(args)
    return Parameters(total + ends, active + ends, gates)


def _blocks(args: argparse.Namespace) -> list[bool]:
    if args.hybrid_layer_pattern is not None:
        main = args.hybrid_layer_pattern.split("/")[0]
        return [kind == "E" for kind in main if kind in "-E"]
    return moe_blocks(args)


def moe_blocks(args: argparse.Namespace) -> list[bool]:
    """For each transformer block of GPT arguments whether its FFN is a mixture of experts."""
    if args.num_experts is None:
        return [False] * args.num_layers
    if isinstance(args.moe_layer_freq, int):
        return [i % args.moe_layer_freq == 0 for i in range(args.num_layers)]
    return [bool(flag) for flag in args.moe_layer_freq]


def _norm(args: argparse.Namespace) -> int:
    return int(args.hidden_size) * (1 if args.normalization == "RMSNorm" else 2)


def _attention(args: argparse.Namespace) -> int:
    """Attention and the two norms of a block."""
    d, heads = args.hidden_size, args.num_attention_heads
    channels = args.kv_channels or d // heads
    groups = args.num_query_groups if args.group_query_attention else heads
    biases = channels * (heads + 2 * groups) + d if args.add_bias_linear else 0
    return int(
        d * channels * (heads + 2 * groups) + heads * channels * d + biases + 2 * _norm(args)
    )


def _ffn(args: argparse.Namespace, width: int) -> int:
    d, inputs = args.hidden_size, 2 if args.swiglu else 1
    biases = inputs * width + d if args.add_bias_linear else 0
    return int((inputs + 1) * d * width + biases)


def _gate(args: argparse.Namespace, moa: MoAConfig) -> int:
    if moa.mixing == "fixed":
        return 0
    return moa.num_coefficients * (args.hidden_size if moa.mixing == "moa" else 1)


def _dense(args: argparse.Namespace, moa: MoAConfig) -> Parameters:
    gate = _gate(args, moa)
    size = _ffn(args, args.ffn_hidden_size or 4 * args.hidden_size) + gate
    return Parameters(size, size, gate)


def _moe(args: argparse.Namespace, moa: MoAConfig) -> Parameters:
    expert = _ffn(args, args.moe_ffn_hidden_size or args.ffn_hidden_size)
    common = args.num_experts * args.hidden_size
    shared_width, shared_gate = args.moe_shared_expert_intermediate_size, 0
    if shared_width:
        common += _ffn(args, shared_width) + (
            args.hidden_size if args.moe_shared_expert_gate else 0
        )
    gate = _gate(args, moa)
    if moa.gate_scope == "layer":
        common += gate
        gates = gate
    else:
        shared_gate = gate if shared_width else 0
        common, expert = common + shared_gate, expert + gate
        gates = shared_gate + args.num_experts * gate
    return Parameters(
        common + args.num_experts * expert, common + args.moe_router_topk * expert, gates
    )
