"""Delayed scaling's history in checkpoints, which Transformer Engine reads only when told to."""

from __future__ import annotations

import argparse
import os
from importlib import util
from typing import Any

ALLOW = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def problems(args: argparse.Namespace, saved: Any) -> list[str]:
    """Allows the run's own history; what comes from elsewhere is for its user to trust.

    The history of largest values is a Python pickle in ``_extra_state``, and reading a pickle can
    run code; other recipes keep none (``transformer_engine.pytorch._extra_state``, from 2.17 on).

    Args:
        saved: the arguments stored in the checkpoint at ``args.load``.
    """
    delayed = getattr(saved, "fp8", None) and getattr(saved, "fp8_recipe", None) == "delayed"
    if not delayed or args.transformer_impl != "transformer_engine":
        return []
    if args.load == args.save:
        os.environ.setdefault(ALLOW, "1")
    if os.environ.get(ALLOW) == "1" or not _asks():
        return []
    return [
        f"--load {args.load}: --fp8-recipe delayed left its history there as Python pickles, and "
        f"reading one can run code. Where you trust the checkpoint, set {ALLOW}=1"
    ]


def _asks() -> bool:
    return util.find_spec("transformer_engine.pytorch._extra_state") is not None
