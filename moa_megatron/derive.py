"""What follows from the arguments: FFN widths of Type-I, HybridModel's layer pattern, modules."""

from __future__ import annotations

import argparse
import re

from moa_megatron import flags, installed, packages
from moa_megatron.config import MoAConfig
from moa_megatron.costs import moe_blocks
from moa_megatron.recipes import RefusedError

LOG_INTERVAL = 10


def ffn(args: argparse.Namespace, moa: MoAConfig, given: set[str], gated_recipe: bool) -> None:
    """Type-I has two matrices where Type-II has three: 4d, and 1.5x the widths of experts.

    Args:
        args: changed in place.
        moa: settings of the method.
        given: arguments that the user has set; they stay.
        gated_recipe: whether the recipe's widths are meant for Type-II.

    Raises:
        RefusedError: where swiglu was asked for or turned off against the variant.
    """
    if moa.mixing == "fixed":
        return
    if moa.gated != bool(args.swiglu) and "swiglu" in given:
        raise RefusedError(
            f"--moa-variant {moa.variant} needs {'--swiglu' if moa.gated else 'an ungated FFN'}, "
            f"but swiglu={bool(args.swiglu)} was asked for; leave swiglu to the variant"
        )
    args.swiglu = moa.gated
    if moa.gated or not gated_recipe or args.use_checkpoint_args:
        return
    if "ffn_hidden_size" not in given:
        args.ffn_hidden_size = 4 * args.hidden_size
    for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        if getattr(args, name) is not None and name not in given:
            setattr(args, name, int(1.5 * getattr(args, name)))


def align(args: argparse.Namespace) -> None:
    """Rounds FFN widths up to multiples of ``--moa-align``, in the baseline too.

    FP8 needs multiples of 16 on every tensor-parallel rank, 16-byte accesses multiples of 8.

    Raises:
        RefusedError: for a multiple below 1.
    """
    multiple = args.moa_align
    if multiple < 1:
        raise RefusedError(f"--moa-align {multiple}: must be 1 or more, such as 64")
    for name in ("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        width = getattr(args, name)
        if width is not None:
            setattr(args, name, -(-width // multiple) * multiple)


def pattern(args: argparse.Namespace) -> None:
    """HybridModel's layer pattern from Megatron's GPT arguments; bars are virtual stages.

    A block of GPTModel is two layers of HybridModel: attention ``*``, then ``-`` (dense) or ``E``.

    Raises:
        RefusedError: where virtual stages do not divide the blocks, or a pattern has its own.
    """
    if args.moa_model != "hybrid":
        args.hybrid_layer_pattern = None
        return
    if args.hybrid_layer_pattern is None:
        if args.num_layers is None:
            raise RefusedError("num_layers is missing: give --num-layers or --hybrid-layer-pattern")
        blocks = ["*E" if moe else "*-" for moe in moe_blocks(args)]
        extra = [blocks[-1]] * (args.mtp_num_layers or 0)
        # Megatron counts the layers of the pattern, two a block.
        args.num_layers = None
    else:
        main, *extra = args.hybrid_layer_pattern.split("/")
        blocks = [main] if "|" in main else re.findall(r"^[^*]+|\*[^*]*", main)
    args.moa_num_blocks = sum(block.count("*") for block in blocks)
    size = _blocks_per_stage(args, blocks)
    main = "|".join("".join(blocks[i : i + size]) for i in range(0, len(blocks), size))
    args.hybrid_layer_pattern = "/".join([main, *extra])
    args.num_layers_per_virtual_pipeline_stage = None
    args.num_virtual_stages_per_pipeline_rank = None


def _blocks_per_stage(args: argparse.Namespace, blocks: list[str]) -> int:
    size = args.num_layers_per_virtual_pipeline_stage
    per_rank = args.num_virtual_stages_per_pipeline_rank
    if size is None and per_rank is None:
        return len(blocks)
    flag = "--num-layers-per-virtual-pipeline-stage"
    value = size
    if size is None:
        flag, value = "--num-virtual-stages-per-pipeline-rank", per_rank
        stages = per_rank * args.pipeline_model_parallel_size
        size = len(blocks) // stages if len(blocks) % stages == 0 else 0
    if "|" in blocks[0]:
        raise RefusedError(f"{flag}={value}: the layer pattern has its own stages; leave one out")
    if args.pipeline_model_parallel_size == 1:
        raise RefusedError(f"{flag}={value} needs --pipeline-model-parallel-size 2 or more")
    if not size or len(blocks) % size:
        raise RefusedError(
            f"{flag}={value} does not cut {len(blocks)} blocks into equal stages for "
            f"--pipeline-model-parallel-size={args.pipeline_model_parallel_size}"
        )
    return int(size)


def modules(args: argparse.Namespace, given: set[str]) -> None:
    """Transformer Engine's modules where they can run, else Megatron's local ones.

    Upstream's default is Transformer Engine, and its fusions are on whether or not they exist here.
    """
    if "transformer_impl" not in given:
        engine = installed.transformer_engine_problem() is None
        args.transformer_impl = "transformer_engine" if engine else "local"
    local = args.transformer_impl == "local"
    grouped = not local or installed.has_grouped_product(bool(args.bf16))
    if grouped and args.num_experts is not None and "moe_grouped_gemm" not in given:
        args.moe_grouped_gemm = True
    if local and "no_persist_layer_norm" not in given:
        args.no_persist_layer_norm = True  # torch's norms, which local modules have, refuse it
    for name, off, extension, also_with_engine in (
        # Megatron's own output layer asks for it, whatever computes the rest.
        ("gradient_accumulation_fusion", False, "fused_weight_gradient_mlp_cuda", True),
        ("masked_softmax_fusion", False, "scaled_upper_triang_masked_softmax_cuda", False),
        ("apply_rope_fusion", False, "transformer_engine", False),
    ):
        if name in given or packages.importable(extension):
            continue
        if local or also_with_engine:
            setattr(args, name, off)


def fp8_recipe(args: argparse.Namespace, moa: MoAConfig, given: bool) -> None:
    """The finest scales that this GPU has, for a mixture whose user names no ``--fp8-recipe``.

    Hidden vectors of mixtures grow with a power of their input (docs/telemetry.md), which delayed
    scaling, Megatron's default, follows a step late.
    """
    if args.fp8 and not given and moa.mixing != "fixed":
        args.fp8_recipe = installed.fp8_recipes()[0]


def log_interval(args: argparse.Namespace) -> None:
    """Statistics of layers are on by default, except where they cannot be gathered.

    Raises:
        RefusedError: for a negative interval.
    """
    if args.moa_log_interval is None:
        args.moa_log_interval = 0 if flags.log_interval_problems(args) else LOG_INTERVAL
    if args.moa_log_interval < 0:
        raise RefusedError(
            f"--moa-log-interval {args.moa_log_interval}: must be 0 (never) or more, such as "
            f"{LOG_INTERVAL}"
        )


def min_lr(args: argparse.Namespace, given: set[str]) -> None:
    """The floor of the schedule follows the peak, also one that the user has chosen.

    Raises:
        RefusedError: for a fraction outside 0 to 1.
    """
    fraction = args.moa_min_lr_fraction
    if fraction is None or "min_lr" in given or args.lr is None:
        return
    if not 0 <= fraction <= 1:
        raise RefusedError(f"--moa-min-lr-fraction {fraction}: must be from 0 to 1, such as 0.05")
    # Written as a person would: checkpoints tell groups of parameters apart by this very number.
    args.min_lr = float(f"{fraction * args.lr:.12g}")
