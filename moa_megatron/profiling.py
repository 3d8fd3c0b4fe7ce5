"""Profiling: the names of the ranges, and checks of Megatron's profiler arguments.

Free of Megatron and torch: the report tool reads the names on machines that have neither.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from moa_megatron import runstate

logger = logging.getLogger(__name__)

# Every range of this project and what it covers; code, docs/profiling.md and the report use these.
RANGES: dict[str, str] = {
    "train.step": "forward of one micro-batch; its name ends with the step's number in the log",
    "moe.router": "router of a MoE layer: logits, top-k, auxiliary losses",
    "moe.shared_experts": "the shared expert, where a MoE layer has one",
    "moe.dispatch": "tokens to the ranks of their experts: bookkeeping, then communication",
    "moe.routed": "a rank's part of a MoE layer: sorting tokens by expert, experts, sorting back",
    "moe.experts": "the routed experts of a rank",
    "moe.combine": "tokens back to their ranks: communication, then the weighted sum",
    "moa.gate": "logits of the gates (LA: its scalars)",
    "moa.fc1": "first linear layer of an FFN, all experts at once where they are grouped",
    "moa.mixture": "gate function, activations and mixture: the kernels mixture_*",
    "moa.fc2": "second linear layer of an FFN",
}


def problems(args: argparse.Namespace, has_device: bool) -> list[str]:
    """Profiler arguments that would capture nothing or fail in the run; warns of a costly choice.

    Args:
        args: Megatron's namespace. The window counts steps from 0; source:
            ``megatron/training/training.py`` (``train``, ``post_training_step_callbacks``).
        has_device: False where the run has no CUDA device; a dry run may say True.
    """
    if not args.profile:
        return _unused(args)
    start, end, found = args.profile_step_start, args.profile_step_end, []
    if not args.use_pytorch_profiler and not has_device:
        found.append(
            "--profile starts a capture of nsys, which needs a CUDA device, and this machine has "
            "none: add --use-pytorch-profiler (./launch/profile.sh: --torch-profiler)"
        )
    if start < 0 or end <= start:
        found.append(
            f"--profile-step-end={end} must lie behind --profile-step-start={start}, which must "
            "not be negative: steps start to end - 1 are captured"
        )
    elif args.train_iters is not None and end > args.train_iters:
        found.append(
            f"--profile-step-end={end} is never reached with --train-iters={args.train_iters}: "
            "lower --profile-step-start and --profile-step-end, or train longer"
        )
    missing = [rank for rank in args.profile_ranks if not 0 <= rank < args.world_size]
    if missing:
        found.append(
            f"--profile-ranks {' '.join(map(str, missing))}: this run has ranks 0 to "
            f"{args.world_size - 1}"
        )
    elif not args.profile_ranks and args.world_size > 1:
        logger.warning(
            "--profile without --profile-ranks captures all %d ranks, in large files: name a few, "
            "such as --profile-ranks 0",
            args.world_size,
        )
    if getattr(args, "enable_ft_package", False):
        found.append(
            "--enable-ft-package with --profile: the fault-tolerance launcher takes a rank that "
            "writes its profile for one that hangs; leave one of them out"
        )
    return found + _resumed(args)


def _unused(args: argparse.Namespace) -> list[str]:
    if args.use_pytorch_profiler:
        return ["--use-pytorch-profiler does nothing without --profile: add it"]
    return []


def _resumed(args: argparse.Namespace) -> list[str]:
    """A window that a continued run has behind it, or cannot hit."""
    try:
        done = runstate.checkpoint_step(Path(args.load)) if args.load else None
    except ValueError:
        return []  # whoever loads it says why
    if not done:
        return []
    if args.use_pytorch_profiler:
        return [
            f"--use-pytorch-profiler in a run that continues from step {done}: Megatron counts its "
            "start from here and its end from step 0, so no trace would be written; use a new "
            "--run-dir"
        ]
    if args.profile_step_start < done:
        return [
            f"--profile-step-start={args.profile_step_start} lies behind this run, which continues "
            f"from step {done}: choose {done} or later, or a new --run-dir"
        ]
    return []
