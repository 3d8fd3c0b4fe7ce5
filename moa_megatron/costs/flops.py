"""FLOPs of a token: matrix products exactly, the mixture's elementwise work by a stated count.

A product of an m x n by an n x k matrix is 2mnk FLOPs; the backward pass does it twice more, once
for each operand. Causal attention counts half of the square, as Megatron does
(``megatron.training.training.num_floating_point_operations``).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from moa_megatron.config import MoAConfig
from moa_megatron.costs.parameters import (
    attention_widths,
    dense_width,
    expert_width,
    layer_patterns,
)

BACKWARD = 2
"""FLOPs of the backward pass in forward passes; of the mixture too, by its own count."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of the forward pass of one token, by part.

    Args:
        projections: queries, keys, values and attention's output.
        attention: scores and weighted values, over the mean length that a causal token sees.
        ffn: fc1 and fc2 of dense FFNs, shared experts and the experts a token is sent to.
        router: logits of all experts; Megatron's own count leaves them out, and so does ``model``.
        gates: logits of MoA's gates, once for each FFN that a token visits.
        mixture: MoA's or LA's elementwise work (``mixture_flops``).
        prediction: projections of multi-token prediction.
        head: output layer, once for each prediction.
    """

    projections: float = 0
    attention: float = 0
    ffn: float = 0
    router: float = 0
    gates: float = 0
    mixture: float = 0
    prediction: float = 0
    head: float = 0

    @property
    def forward(self) -> float:
        """All of it."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    @property
    def training(self) -> float:
        """Forward and backward, without recomputation."""
        return (1 + BACKWARD) * self.forward

    @property
    def model(self) -> float:
        """What throughput and MFU count: training without the router, Megatron's convention."""
        return (1 + BACKWARD) * (self.forward - self.router)


def flops(args: argparse.Namespace, moa: MoAConfig, vocab_size: int) -> Flops:
    """FLOPs of one token of the model that ``args`` describe.

    Args:
        args: Megatron's namespace; attention is ordinary, MHA or GQA.
        moa: settings of the method.
        vocab_size: rows of the output layer, padding included.
    """
    patterns = layer_patterns(args)
    layers, depths, d = "".join(patterns), len(patterns) - 1, args.hidden_size
    queries, keys = attention_widths(args)
    visits = ffn_visits(args, layers)
    return Flops(
        projections=layers.count("*") * 2 * d * (2 * queries + 2 * keys),
        attention=layers.count("*") * 2 * args.seq_length * queries,
        ffn=sum(
            (6 if args.swiglu else 4) * inputs * width * times for inputs, width, times in visits
        )
        + layers.count("E") * 4 * d * (args.moe_latent_size or 0),
        router=layers.count("E") * 2 * d * (args.num_experts or 0),
        gates=gate_flops(args, moa),
        mixture=mixture_flops(args, moa),
        prediction=depths * 4 * d * d,
        head=(1 + depths) * 2 * d * vocab_size,
    )


def ffn_visits(args: argparse.Namespace, layers: str) -> list[tuple[int, int, int]]:
    """The FFNs that a token passes in ``layers``: input width, hidden width D, how often."""
    d, dense, moe = args.hidden_size, layers.count("-"), layers.count("E")
    visits = [(d, dense_width(args), dense)]
    if moe:
        latent = args.moe_latent_size or d
        visits.append((latent, expert_width(args), moe * args.moe_router_topk))
        visits.append((d, args.moe_shared_expert_intermediate_size or 0, moe))
    return [visit for visit in visits if visit[1] and visit[2]]


def gate_flops(args: argparse.Namespace, moa: MoAConfig) -> float:
    """FLOPs of gate logits of a token, forward: x U^T in every FFN it visits; none for LA."""
    if moa.mixing != "moa":
        return 0.0
    layers = "".join(layer_patterns(args))
    visits = ffn_visits(args, layers)
    return float(sum(2 * moa.num_coefficients * inputs * times for inputs, _, times in visits))


def mixture_flops(args: argparse.Namespace, moa: MoAConfig) -> float:
    """Elementwise FLOPs of the mixtures of a token, forward, by this count for a hidden element:

    one for each activation of each branch; a multiplication and an addition for each coefficient
    (for ``qd`` and the pair's product before it); one for the product of the two branches. An
    activation counts one, whatever its instructions (moa_megatron/kernels/README.md counts those).
    The backward pass has the slope for each activation, and for each coefficient its part of the
    input's gradient and its own gradient: twice as much.
    """
    if moa.mixing == "fixed":
        return 0.0
    size, coefficients = len(moa.names), moa.num_coefficients
    element = {
        "type1": size + 2 * coefficients,
        "one": (size + 1) + 2 * coefficients + 1,
        "bi": 2 * size + 2 * coefficients + 1,
        "qd": 2 * size + 3 * coefficients,
    }[moa.variant]
    visits = ffn_visits(args, "".join(layer_patterns(args)))
    return float(sum(element * width * times for _, width, times in visits))


def missing_from_megatron(args: argparse.Namespace, moa: MoAConfig) -> float:
    """Training FLOPs of a token that Megatron's own count leaves out, apart from the router.

    Gates and mixture, which it cannot know; and HybridModel's projections of multi-token
    prediction, which it counts for GPTModel only.
    """
    forward = gate_flops(args, moa) + mixture_flops(args, moa)
    if args.hybrid_layer_pattern is not None:
        forward += (len(layer_patterns(args)) - 1) * 4 * args.hidden_size**2
    return (1 + BACKWARD) * forward
