"""Every parameter of a model, whole or on one rank of a layout, from its arguments alone.

Formulas of the method paper, section 5 and appendix A.1; what tensor, pipeline, expert and expert
tensor parallelism leave on a rank follows Megatron's linear layers, embeddings and stages. Held
against models that Megatron builds, whole (tests/unit/test_costs.py) and by rank
(tests/unit/test_costs_ranks.py). Special layers of HybridModel (Mamba and others) are not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moa_megatron.config import MoAConfig
from moa_megatron.layout import Layout


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: ``active`` ones serve one token, ``gates`` are part of ``total``."""

    total: int
    active: int
    gates: int


@dataclass(frozen=True)
class Weight:
    """Tensors alike: ``copies`` of ``numel`` numbers, of which ``active`` serve one token.

    Args:
        matrix: Muon orthogonalises it; the others stay on AdamW.
        expert: reduced over the expert data-parallel ranks only.
        gate: gate vectors or learned coefficients.
    """

    numel: int
    copies: int = 1
    active: int = 1
    matrix: bool = False
    expert: bool = False
    gate: bool = False


def parameters(args: argparse.Namespace, moa: MoAConfig, vocab_size: int) -> Parameters:
    """Parameters of the whole model that ``args`` describe, whatever layout they ask for.

    Args:
        args: Megatron's namespace.
        moa: settings of the method.
        vocab_size: rows of the embedding, padding included.
    """
    if getattr(args, "moa_model", None) == "mae":
        from moa_megatron.vision import costs  # which needs this module

        return costs.parameters(args, moa)
    whole = weights(args, moa, vocab_size, Layout())
    return Parameters(
        total=sum(w.numel * w.copies for w in whole),
        active=sum(w.numel * w.active for w in whole),
        gates=sum(w.numel * w.copies for w in whole if w.gate),
    )


def weights(
    args: argparse.Namespace, moa: MoAConfig, vocab_size: int, layout: Layout, stage: int = 0
) -> list[Weight]:
    """The tensors of one rank, in the model's order.

    Args:
        layout: sizes of the parallel dimensions.
        stage: pipeline rank; it holds ``layout.vpp`` parts of the model.
    """
    first, last = stage == 0, stage == layout.pp - 1
    _, *depths = layer_patterns(args)
    embedding = Weight(vocab_size // layout.tp * args.hidden_size)
    found: list[Weight] = []
    # Multi-token prediction, at the end, embeds its tokens there.
    if first or (last and depths):
        found.append(embedding)
        if args.position_embedding_type == "learned_absolute":
            found.append(Weight(args.max_position_embeddings * args.hidden_size))
    for kind in stage_layers(args, layout)[stage]:
        found += _layer(args, moa, layout, kind)
    if last:
        found += _norm(args)
        for depth in depths:
            found += [*_norm(args), *_norm(args), *_norm(args)]
            found.append(Weight(2 * args.hidden_size**2 // layout.tp, matrix=True))
            found += [weight for kind in depth for weight in _layer(args, moa, layout, kind)]
        # A tied output layer is the embedding itself, where that is on the same rank.
        if args.untie_embeddings_and_output_weights or not (first or depths):
            found.append(embedding)
    return found


def layer_patterns(args: argparse.Namespace) -> list[str]:
    """HybridModel's layers of the decoder, then of each depth of multi-token prediction.

    GPTModel's blocks are written as HybridModel's: ``*-`` (dense) or ``*E``. Bars stay in place.
    """
    if args.hybrid_layer_pattern is not None:
        return str(args.hybrid_layer_pattern).split("/")
    blocks = ["*E" if moe else "*-" for moe in moe_blocks(args)]
    return ["".join(blocks), *[blocks[-1]] * (args.mtp_num_layers or 0)]


def stage_layers(args: argparse.Namespace, layout: Layout) -> list[str]:
    """The layers of each pipeline rank, as Megatron deals them out.

    Bars cut the pattern into parts, which go round the ranks; without bars each rank gets an equal
    part, and with virtual stages as many equal parts as it has of them.
    """
    main, *_ = layer_patterns(args)
    parts = main.split("|")
    if len(parts) == 1:
        count = layout.pp * layout.vpp
        size = -(-len(main) // count)
        parts = [main[index * size : (index + 1) * size] for index in range(count)]
    return ["".join(parts[rank :: layout.pp]) for rank in range(layout.pp)]


def moe_blocks(args: argparse.Namespace) -> list[bool]:
    """For each transformer block of GPT arguments whether its FFN is a mixture of experts."""
    if args.num_experts is None:
        return [False] * args.num_layers
    if isinstance(args.moe_layer_freq, int):
        return [i % args.moe_layer_freq == 0 for i in range(args.num_layers)]
    return [bool(flag) for flag in args.moe_layer_freq]


def attention_widths(args: argparse.Namespace) -> tuple[int, int]:
    """Channels of all queries, and of all keys (as many as of all values)."""
    heads = args.num_attention_heads
    channels = args.kv_channels or args.hidden_size // heads
    groups = args.num_query_groups if args.group_query_attention else heads
    return channels * heads, channels * groups


def dense_width(args: argparse.Namespace) -> int:
    """Width D of dense FFNs; where none is given Megatron's ``validate_args`` chooses."""
    d = args.hidden_size
    return int(args.ffn_hidden_size or (int(4 * d * 2 / 3) // 64 * 64 if args.swiglu else 4 * d))


def expert_width(args: argparse.Namespace) -> int:
    """Width D of a routed expert."""
    return int(args.moe_ffn_hidden_size or dense_width(args))


def _layer(args: argparse.Namespace, moa: MoAConfig, layout: Layout, kind: str) -> Iterator[Weight]:
    if kind == "*":
        yield from _attention(args, layout)
    elif kind == "-":
        yield from _norm(args)
        yield from _ffn(args, args.hidden_size, dense_width(args), layout.tp)
        yield from _gate(moa, args.hidden_size)
    elif kind == "E":
        yield from _moe(args, moa, layout)


def _norm(args: argparse.Namespace) -> list[Weight]:
    return [Weight(args.hidden_size)] * (1 if args.normalization == "RMSNorm" else 2)


def _attention(args: argparse.Namespace, layout: Layout) -> Iterator[Weight]:
    """Attention and the norm in front of it."""
    d, tp = args.hidden_size, layout.tp
    queries, keys = attention_widths(args)
    yield from _norm(args)
    yield Weight((queries + 2 * keys) // tp * d, matrix=True)
    if args.add_bias_linear or args.add_qkv_bias:
        yield Weight((queries + 2 * keys) // tp)
    if args.qk_layernorm:
        channels = queries // args.num_attention_heads
        yield from [Weight(channels)] * (2 * len(_norm(args)))
    yield Weight(d * queries // tp, matrix=True)
    if args.add_bias_linear:
        yield Weight(d)


def _ffn(args: argparse.Namespace, inputs: int, width: int, tp: int) -> Iterator[Weight]:
    up = (2 if args.swiglu else 1) * width // tp
    yield Weight(up * inputs, matrix=True)
    if args.add_bias_linear:
        yield Weight(up)
    yield Weight(inputs * width // tp, matrix=True)
    if args.add_bias_linear:
        yield Weight(inputs)


def _gate(moa: MoAConfig, inputs: int) -> Iterator[Weight]:
    if moa.mixing != "fixed":
        size = moa.num_coefficients * (inputs if moa.mixing == "moa" else 1)
        yield Weight(size, gate=True)


def _moe(args: argparse.Namespace, moa: MoAConfig, layout: Layout) -> Iterator[Weight]:
    d, latent = args.hidden_size, args.moe_latent_size
    yield from _norm(args)
    yield Weight(args.num_experts * d, matrix=True)  # the router
    if latent:
        yield from [Weight(d * latent, matrix=True)] * 2
    yield from _expert(args, moa, layout)
    shared = args.moe_shared_expert_intermediate_size
    if shared:
        yield from _ffn(args, d, shared, layout.tp)
        if args.moe_shared_expert_gate:
            yield Weight(d, matrix=True)
        if moa.gate_scope == "expert":
            yield from _gate(moa, d)
    if moa.gate_scope == "layer":
        yield from _gate(moa, d)


def _expert(args: argparse.Namespace, moa: MoAConfig, layout: Layout) -> Iterator[Weight]:
    """Routed experts of one rank."""
    inputs = args.moe_latent_size or args.hidden_size
    kinds = list(_ffn(args, inputs, expert_width(args), layout.etp))
    if moa.gate_scope == "expert":
        kinds += _gate(moa, inputs)
    for weight in kinds:
        yield replace(
            weight,
            copies=args.num_experts // layout.ep,
            active=args.moe_router_topk,
            expert=layout.own_expert_ranks,
        )
