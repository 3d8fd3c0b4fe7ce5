"""Bytes that one micro-batch keeps on a rank from its forward to its backward pass.

One term for each tensor that autograd saves in Megatron's layers (megatron.core.transformer) with
MoA in place; MoA and SwiGLU save the same pre-activations, MoA its float32 gate logits besides
(moa_megatron/kernels/README.md). Held against really saved tensors in tests/unit/test_costs_memory.

Letters: e bytes of a number, t tokens of a micro-batch on this rank, u the same where sequence
parallelism splits them over the tensor-parallel ranks too, r tokens routed to this rank's experts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from moa_megatron.config import MoAConfig
from moa_megatron.costs.parameters import (
    attention_widths,
    dense_width,
    expert_width,
    layer_patterns,
    stage_layers,
)
from moa_megatron.layout import Layout

IMBALANCE = 1.5
"""Assumed: tokens on the busiest expert-parallel rank, relative to an even spread."""


@dataclass(frozen=True)
class Modules:
    """What computes the layers, as far as it changes what is saved.

    Args:
        flash: attention keeps one number a row instead of all scores.
        fused_norm: norms keep their input; torch's on a CPU keeps two float32 copies.
        fused_rope: nothing is kept for it.
    """

    flash: bool = True
    fused_norm: bool = True
    fused_rope: bool = True


ENGINE = Modules()
"""Transformer Engine's modules."""
LOCAL = Modules(flash=False, fused_rope=False)
"""Megatron's local modules on a GPU, whose attention materialises the scores."""
HOST = Modules(flash=False, fused_norm=False, fused_rope=False)
"""The same on a CPU."""


@dataclass(frozen=True)
class Activations:
    """Bytes on the busiest rank of a pipeline stage: ``attention``, ``ffn`` (dense and shared),
    ``routed`` (experts, router, dispatch), ``head`` (last norm, logits, loss), and ``working``:
    what is there for a moment, be it gradients of the largest layer or a layer recomputed."""

    attention: float
    ffn: float
    routed: float
    head: float
    working: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.attention + self.ffn + self.routed + self.head + self.working


class Saved:
    """Bytes saved by each kind of layer, for one micro-batch of ``args`` on a rank of ``layout``.

    Args:
        imbalance: tokens routed here relative to an even spread; 1 without expert parallelism,
            where no token leaves its rank.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        moa: MoAConfig,
        layout: Layout,
        modules: Modules,
        imbalance: float = IMBALANCE,
    ) -> None:
        self.args, self.moa, self.layout, self.modules = args, moa, layout, modules
        self.e = number_bytes(args)
        self.length = args.seq_length / layout.cp
        self.t = args.micro_batch_size * self.length
        split = layout.tp if layout.tp > 1 and args.sequence_parallel else 1
        self.u = self.t / split
        spread = imbalance if layout.ep > 1 else 1.0
        self.r = self.u * (args.moe_router_topk or 0) * layout.etp * spread
        self.logits = 4 * moa.num_coefficients if moa.mixing == "moa" else 0
        self.recomputed = recomputed_modules(args)

    def norm(self, last: bool = False) -> float:
        """Input, which the residual connection shares, and one float32 number a token."""
        d = self.args.hidden_size
        if "layernorm" in self.recomputed and not last:
            return self.u * self.e * d
        return self.u * ((self.e if self.modules.fused_norm else 8) * d + 4)

    def norm_output(self) -> float:
        """Input of the linear layers behind the norm, and of gates and router."""
        return self.u * self.e * self.args.hidden_size

    def attention(self) -> float:
        """Norm, its output, rotated queries and keys, all of qkv's output (values are a view of
        it), attention's output, and scores or their row sums."""
        args, tp = self.args, self.layout.tp
        queries, keys = attention_widths(args)
        heads = args.num_attention_heads
        found = self.norm()
        if "layernorm" not in self.recomputed:
            found += self.norm_output()
        found += self.t * self.e * (2 * queries + keys) / tp  # rotated, and the output
        found += self.t * self.e * (queries + 2 * keys) / tp
        if not self.modules.fused_rope:
            found += self.length * 4 * self.e * (queries // heads)
        if "core_attn" not in self.recomputed:
            row = self.e * args.seq_length if not self.modules.flash else 4
            found += self.t * row * heads / tp
            found += 0 if self.modules.flash else self.length * args.seq_length  # the mask
        return found

    def dense(self) -> float:
        """Norm and a dense FFN."""
        kept = self._ffn(self.t, dense_width(self.args), self.layout.tp)
        if "mlp" in self.recomputed:
            return self.norm() + self.norm_output()
        output = 0.0 if "layernorm" in self.recomputed else self.norm_output()
        return self.norm() + output + kept

    def shared(self) -> float:
        """A shared expert; its input is the norm's output.

        Overlapped with the dispatcher, fc1 keeps what sequence parallelism gathers for it: read in
        ``SharedExpertMLP.pre_forward_comm``, since the tests of this file have one rank.
        """
        width = self.args.moe_shared_expert_intermediate_size
        if not width or {"moe", "shared_experts"} & self.recomputed:
            return 0.0
        gathered = self.args.moe_shared_expert_overlap and self.u < self.t
        kept = self.t * self.e * self.args.hidden_size if gathered else 0.0
        return kept + self._ffn(self.t, width, self.layout.tp)

    def routed(self) -> float:
        """Norm, router, dispatched tokens and the routed experts of this rank."""
        args = self.args
        if "moe" in self.recomputed:
            return self.norm() + self.norm_output()
        output = 0.0 if "layernorm" in self.recomputed else self.norm_output()
        # float32 scores and int64 sorting of the map; weights and 8-byte indices of the chosen.
        router = self.u * (12 * args.num_experts + 28 * args.moe_router_topk)
        latent = args.moe_latent_size or args.hidden_size
        tokens = self.r * self.e * (latent + 1)
        experts = self._ffn(self.r, expert_width(args), self.layout.etp)
        if "moe_act" in self.recomputed:
            experts -= self.r * self.e * expert_width(args) / self.layout.etp
        return self.norm() + output + router + tokens + experts

    def _ffn(self, tokens: float, width: int, split: int) -> float:
        """Pre-activations, gate logits, hidden vectors."""
        branches = 2 if self.args.swiglu else 1
        return tokens * (self.e * (branches + 1) * width / split + self.logits)

    def layer(self, kind: str) -> tuple[float, float, float]:
        """Attention, FFN and routed bytes of a layer ``*``, ``-`` or ``E``."""
        if kind == "*":
            return self.attention(), 0.0, 0.0
        if kind == "-":
            return 0.0, self.dense(), 0.0
        return (0.0, self.shared(), self.routed()) if kind == "E" else (0.0, 0.0, 0.0)

    def head(self) -> float:
        """Last norm and its output, the float32 softmax of the logits, labels and masks."""
        vocabulary = self.args.padded_vocab_size / self.layout.tp
        return self.norm(last=True) + self.norm_output() + self.t * (4 * vocabulary + 9)

    def prediction(self) -> float:
        """What a depth of multi-token prediction has before its block: two norms, both outputs."""
        return 2 * self.norm() + 2 * self.norm_output()

    def gradients(self, kind: str) -> float:
        """The largest gradients that live at once within a layer: those of fc1's output and of the
        hidden vectors, or of qkv and its output."""
        branches = 2 if self.args.swiglu else 1
        if kind == "*":
            queries, keys = attention_widths(self.args)
            return self.t * self.e * (2 * queries + 2 * keys) / self.layout.tp
        if kind == "-":
            return self._gradients(self.t, dense_width(self.args), self.layout.tp, branches)
        if kind == "E":
            return self._gradients(self.r, expert_width(self.args), self.layout.etp, branches)
        return 0.0

    def _gradients(self, tokens: float, width: int, split: int, branches: int) -> float:
        return tokens * self.e * (branches + 1) * width / split


def number_bytes(args: argparse.Namespace) -> int:
    """Bytes of a parameter or activation: bf16, fp16 or fp32. FP8 keeps its copies beside them."""
    return 2 if args.bf16 or args.fp16 else 4


def recomputed_modules(args: argparse.Namespace) -> set[str]:
    """What selective recomputation drops; Megatron's default is core attention."""
    # Megatron's validation turns the second flag into the first.
    short = getattr(args, "recompute_activations", False)
    if args.recompute_granularity != "selective" and not short:
        return set()
    return set(args.recompute_modules or ["core_attn"])


def activations(
    args: argparse.Namespace,
    moa: MoAConfig,
    layout: Layout,
    stage: int,
    micro_batches: int,
    modules: Modules = ENGINE,
    imbalance: float = IMBALANCE,
) -> Activations:
    """Peak of the saved bytes on a rank of a pipeline stage.

    Args:
        args: Megatron's namespace, with ``padded_vocab_size``, micro-batch and recomputation.
        stage: pipeline rank.
        micro_batches: micro-batches of a step on each rank.
        modules: what computes the layers.
        imbalance: see ``Saved``.
    """
    saved = Saved(args, moa, layout, modules, imbalance)
    layers = stage_layers(args, layout)[stage]
    patterns = layer_patterns(args)
    last = stage == layout.pp - 1
    extra = "".join(patterns[1:]) if last else ""
    times = in_flight(layout, stage, micro_batches)
    attention = ffn = routed = working = 0.0
    if args.recompute_granularity == "full":
        attention, working = _full(args, saved, layers, times)
        layers = ""
    for kind, count in [(kind, times) for kind in layers] + [(kind, 1.0) for kind in extra]:
        one = saved.layer(kind)
        attention, ffn, routed = (
            attention + count * one[0],
            ffn + count * one[1],
            routed + count * one[2],
        )
    working = max([working, *(saved.gradients(kind) for kind in layers + extra)])
    head = 0.0
    if last:
        # Logits in the model's own precision live beside their float32 softmax.
        head = len(patterns) * saved.head() + (len(patterns) - 1) * saved.prediction()
        working = max(working, saved.t * saved.e * args.padded_vocab_size / layout.tp)
    return Activations(attention, ffn, routed, head, working)


def _full(args: argparse.Namespace, saved: Saved, layers: str, times: float) -> tuple[float, float]:
    """Inputs of the recomputed groups, and one group while it is recomputed and differentiated.

    ``--recompute-num-layers`` counts HybridModel's layers, of which a block has two, or GPTModel's
    blocks.
    """
    unit = 1 if args.hybrid_layer_pattern is not None else 2
    size = unit * (args.recompute_num_layers or 1)
    if args.recompute_method == "block":
        plain = layers[size:]
        groups = [layers[i : i + unit] for i in range(0, min(size, len(layers)), unit)]
    else:
        plain = ""
        groups = [layers[i : i + size] for i in range(0, len(layers), size)]
    kept = times * (
        len(groups) * saved.norm_output() + sum(sum(saved.layer(kind)) for kind in plain)
    )
    working = max(
        (sum(sum(saved.layer(k)) + saved.gradients(k) for k in group) for group in groups),
        default=0.0,
    )
    return kept, working


def in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a rank holds at once, of its whole part of the model.

    Source: the warm-up of ``forward_backward_pipelining_without_interleaving`` and of
    ``get_pp_rank_microbatches`` in ``megatron.core.pipeline_parallel.schedules``.
    """
    behind = layout.pp - stage - 1
    if layout.vpp == 1:
        return min(micro_batches, behind + 1)
    chunks = min(micro_batches * layout.vpp, 2 * behind + (layout.vpp - 1) * layout.pp + 1)
    return chunks / layout.vpp
