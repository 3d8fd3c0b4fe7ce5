"""Delayed scaling's history in checkpoints, which Transformer Engine reads only when told to."""

from __future__ import annotations

import argparse
import logging
import os
from importlib import util
from typing import Any

logger = logging.getLogger(__name__)
ALLOW = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def problems(args: argparse.Namespace, saved: Any) -> list[str]:
    """Whether the history may be read, and goes with this run's experts.

    That in the run's own folder may; a ``--load`` is for its user to trust: the history of largest
    values is a Python pickle in ``_extra_state``, and reading a pickle can run code. Other recipes
    keep none (``transformer_engine.pytorch._extra_state``, from 2.17 on).

    Args:
        saved: the arguments stored in the checkpoint at ``args.load``.
    """
    if args.transformer_impl != "transformer_engine" or not _delayed(saved):
        return []
    found = [] if not _delayed(args) else _moved(args, saved)
    trusted = os.environ.get(ALLOW, "1" if args.load == args.save else "0") == "1"
    if trusted or not _asks():
        return found
    return [
        f"--load {args.load}: --fp8-recipe delayed left its history there as Python pickles, and "
        f"reading one can run code. Where you trust the checkpoint, set {ALLOW}=1",
        *found,
    ]


def allow_own(args: argparse.Namespace, saved: Any) -> None:
    """Lets Transformer Engine read the history in the run's own folder, once nothing is refused."""
    engine = args.transformer_impl == "transformer_engine"
    if engine and _delayed(saved) and args.load == args.save and ALLOW not in os.environ:
        logger.info("%s=1: the run reads its own history of FP8 scales", ALLOW)
        os.environ[ALLOW] = "1"


def _moved(args: argparse.Namespace, saved: Any) -> list[str]:
    """Megatron takes the scales of grouped experts apart in another order than they have.

    ``TEGroupedLinear`` reads kind by kind what ``GroupedLinear`` writes product by product, which
    is harmless while each rank keeps its experts.
    """
    names = ("expert_model_parallel_size", "moe_grouped_gemm")
    pairs = [(name, getattr(saved, name, None), getattr(args, name, None)) for name in names]
    found = [
        f"{name}: checkpoint {old}, this run {new}"
        for name, old, new in pairs
        if old is not None and old != new
    ]
    if not found or not args.num_experts or not (pairs[1][1] or pairs[1][2]):
        return []
    return [
        f"delayed scaling's history in {args.load} cannot be given to other experts "
        f"({'; '.join(found)}): keep these, or continue with another --fp8-recipe"
    ]


def _delayed(args: Any) -> bool:
    """Also for checkpoints that are older than the choice of a recipe."""
    recipe = getattr(args, "fp8_recipe", None) or "delayed"
    return bool(getattr(args, "fp8", None)) and recipe == "delayed"


def _asks() -> bool:
    return util.find_spec("transformer_engine.pytorch._extra_state") is not None
