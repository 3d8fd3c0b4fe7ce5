"""Parallel sizes, batch sizes and schedules that do not fit each other.

Plain arithmetic on arguments: the trainer checks Megatron's namespace with it, and the submit
command an outline of recipe and flags, where neither torch nor Megatron is installed.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions: tensor, pipeline (with ``vpp`` parts of the model on each
    rank), context, expert, expert tensor, data. Experts divide the ranks of a stage anew.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def dense_ranks(self) -> int:
        """Ranks that hold the same part of all but experts, and sum its gradients."""
        return self.cp * self.dp

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold the same experts, and sum their gradients."""
        return self.tp * self.cp * self.dp // (self.ep * self.etp)

    @property
    def own_expert_ranks(self) -> bool:
        """Whether experts have data-parallel ranks, buffers and optimisers of their own.

        Source: the attribute ``allreduce`` in ``megatron.core.tensor_parallel.layers``.
        """
        return self.ep > 1 or self.etp != self.tp

    def flags(self) -> list[str]:
        """Megatron's flags for it; virtual stages are left to the caller, who knows the blocks."""
        sizes = {
            "tensor-model": self.tp,
            "pipeline-model": self.pp,
            "context": self.cp,
            "expert-model": self.ep,
        }
        found = [f"--{name}-parallel-size={size}" for name, size in sizes.items() if size > 1]
        if self.etp != self.tp:
            found.append(f"--expert-tensor-parallel-size={self.etp}")
        return [*found, "--sequence-parallel"] if self.tp > 1 else found

    def __str__(self) -> str:
        sizes = {"TP": self.tp, "PP": self.pp, "VPP": self.vpp, "CP": self.cp, "EP": self.ep}
        shown = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        shown += [f"ETP {self.etp}"] if self.etp != self.tp else []
        shown += [f"DP {self.dp}"] if self.dp > 1 else []
        return " x ".join(shown) or "one process"


def schedule_problems(args: argparse.Namespace) -> list[str]:
    """A warm-up that outlasts the run."""
    steps = args.lr_decay_iters or args.train_iters
    if not args.lr_warmup_iters or steps is None or args.lr_warmup_iters < steps:
        return []
    return [
        f"--lr-warmup-iters={args.lr_warmup_iters} does not end within {steps} steps; lower it or "
        "use --lr-warmup-fraction 0.1"
    ]


def problems(args: argparse.Namespace) -> list[str]:
    """Parallel sizes that do not divide what they split, with the sizes that would."""
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    found: list[str] = []

    def divides(what: str, total: int | None, size: int, flag: str) -> None:
        if total is not None and total % size:
            found.append(f"{flag}={size} does not divide {what} ({total}); {_choices(total)}")

    world = args.world_size
    if world % (tp * pp * cp):
        found.append(
            f"{world} processes cannot hold tensor ({tp}) x pipeline ({pp}) x context ({cp}) = "
            f"{tp * pp * cp}; start a multiple of {tp * pp * cp}, or lower one of them"
        )
        data_parallel = 1
    else:
        data_parallel = world // (tp * pp * cp)
    heads = args.num_attention_heads
    divides("the attention heads", heads, tp, "--tensor-model-parallel-size")
    groups = args.num_query_groups if args.group_query_attention else None
    # Fewer groups than ranks are copied: TransformerConfig asks for a multiple or a divisor.
    if groups is not None and heads is not None and heads % groups:
        found.append(
            f"--num-query-groups={groups} does not divide the attention heads ({heads}); "
            f"{_choices(heads)}"
        )
    if groups is not None and tp % groups:
        divides("the query groups", groups, tp, "--tensor-model-parallel-size")
    if args.kv_channels is None and args.hidden_size and heads and args.hidden_size % heads:
        found.append(
            f"--num-attention-heads={heads} does not divide --hidden-size={args.hidden_size}"
        )
    for width in _dense_widths(args):
        if width is not None and width % tp:
            found.append(
                f"--tensor-model-parallel-size={tp} does not divide the FFN width ({width}); "
                f"{_align(tp)}, or {_choices(width)}"
            )
    if not _has_own_stages(args):
        what, total = _layers(args)
        divides(what, total, pp, "--pipeline-model-parallel-size")
    found += _virtual_stage_problems(args, pp, data_parallel)
    if cp > 1:
        divides("half the sequence length", args.seq_length // 2, cp, "--context-parallel-size")
    if args.sequence_parallel:
        divides("the sequence length", args.seq_length // cp, tp, "--tensor-model-parallel-size")
    found += _batch_problems(args, data_parallel)
    if args.num_experts is not None:
        found += _expert_problems(args, tp, pp)
    return found


def _layers(args: argparse.Namespace) -> tuple[str, int | None]:
    """What stages have equal parts of: HybridModel's layers, two a block, or GPTModel's blocks."""
    if args.hybrid_layer_pattern:
        return "the layers of the pattern", len(args.hybrid_layer_pattern.split("/")[0])
    if args.num_layers is None:
        return "the blocks", None
    if getattr(args, "moa_model", "hybrid") == "gpt":
        # Megatron may count the embedding and the loss as a block each.
        names = ("embedding", "loss")
        flags = [f"account_for_{name}_in_pipeline_split" for name in names]
        return "the blocks", args.num_layers + sum(bool(getattr(args, f, None)) for f in flags)
    return "the layers of the blocks, two each", 2 * args.num_layers


def _virtual_stage_problems(args: argparse.Namespace, pp: int, data_parallel: int) -> list[str]:
    pattern = (args.hybrid_layer_pattern or "").split("/")[0]
    segments = pattern.count("|") + 1
    if segments > 1 and segments % pp:
        return [
            f"the layer pattern {pattern} has {segments} pipeline segments, which "
            f"--pipeline-model-parallel-size={pp} does not divide; {_choices(segments)}"
        ]
    if segments <= pp and not _asks_for_virtual_stages(args, pp):
        return []
    # Interleaved stages take micro-batches in groups; source: the first checks of
    # megatron.core.pipeline_parallel.schedules.forward_backward_pipelining_with_interleaving.
    if not args.global_batch_size or not args.micro_batch_size or pp == 1:
        return []
    count = args.global_batch_size // (args.micro_batch_size * data_parallel)
    group = getattr(args, "microbatch_group_size_per_vp_stage", None) or pp
    if pp <= group <= count and (count % group == 0 or count % group >= pp):
        return []
    return [
        f"virtual pipeline stages take micro-batches in groups of {group}, at least "
        f"--pipeline-model-parallel-size={pp}; a step has {count} on each rank: choose batch sizes "
        f"that give a multiple of {pp}"
    ]


def _asks_for_virtual_stages(args: argparse.Namespace, pp: int) -> bool:
    """Whether flags cut a rank's blocks; a virtual stage as large as a whole one does not."""
    per_rank = getattr(args, "num_virtual_stages_per_pipeline_rank", None)
    size = getattr(args, "num_layers_per_virtual_pipeline_stage", None)
    if per_rank is not None:
        return int(per_rank) > 1
    return size is not None and (args.num_layers is None or size * pp != args.num_layers)


def _has_own_stages(args: argparse.Namespace) -> bool:
    return bool(
        "|" in (args.hybrid_layer_pattern or "")
        or args.pipeline_model_parallel_layout
        or args.decoder_first_pipeline_num_layers
        or args.decoder_last_pipeline_num_layers
    )


def _dense_widths(args: argparse.Namespace) -> list[int | None]:
    """Widths of the FFNs that tensor parallelism splits: dense blocks and shared experts."""
    pattern = args.hybrid_layer_pattern
    every = args.moe_layer_freq
    all_moe = (
        "-" not in pattern if pattern else (all(every) if isinstance(every, list) else every == 1)
    )
    if args.num_experts is None:
        return [args.ffn_hidden_size]
    shared = args.moe_shared_expert_intermediate_size
    return [shared] if all_moe else [shared, args.ffn_hidden_size]


def _batch_problems(args: argparse.Namespace, data_parallel: int) -> list[str]:
    micro = args.micro_batch_size
    if micro is None or micro < 1:
        return [f"--micro-batch-size={micro}: must be at least 1"]
    if any(
        getattr(args, name, None)
        for name in ("decrease_batch_size_if_needed", "step_batch_size_schedule")
    ):
        return []  # Megatron rounds the size down, or takes others
    problems = []
    for flag, value, size in (
        ("--global-batch-size", args.global_batch_size, micro),
        (
            "--eval-global-batch-size",
            args.eval_global_batch_size,
            args.eval_micro_batch_size or micro,
        ),
    ):
        step = size * data_parallel
        if value is not None and value % step:
            nearest = max(step, round(value / step) * step)
            problems.append(
                f"{flag}={value} is not a multiple of micro batch ({size}) x data parallel size "
                f"({data_parallel}) = {step}; nearest: {nearest}"
            )
    return problems


def _expert_problems(args: argparse.Namespace, tp: int, pp: int) -> list[str]:
    ep = args.expert_model_parallel_size
    etp = args.expert_tensor_parallel_size or tp
    experts, problems = args.num_experts, []
    if experts % ep:
        problems.append(
            f"--expert-model-parallel-size={ep} does not divide the experts ({experts}); "
            f"{_choices(experts)}"
        )
    if args.world_size % (ep * etp * pp):
        problems.append(
            f"{args.world_size} processes cannot hold expert ({ep}) x expert tensor ({etp}) x "
            f"pipeline ({pp}) = {ep * etp * pp}; start a multiple of it, or lower one of them"
        )
    width = args.moe_ffn_hidden_size or args.ffn_hidden_size
    if width is not None and width % etp:
        problems.append(
            f"--expert-tensor-parallel-size={etp} does not divide the experts' width ({width}); "
            f"{_align(etp)}, or {_choices(width)}"
        )
    if args.moe_router_topk > experts:
        problems.append(f"--moe-router-topk={args.moe_router_topk} exceeds --num-experts={experts}")
    if tp > 1 and not args.sequence_parallel:
        problems.append(
            f"--tensor-model-parallel-size={tp} with experts needs --sequence-parallel: add it"
        )
    return problems


def _align(size: int) -> str:
    """The flag that rounds widths up, which the paper's odd ones need; 64 where that serves."""
    return f"add --moa-align {math.lcm(64, size)} to round FFN widths up"


def _choices(total: int) -> str:
    divisors = [n for n in range(1, min(total, 64) + 1) if total % n == 0]
    return "choose from " + ", ".join(map(str, divisors))
