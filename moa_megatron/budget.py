"""How long a run trains: a budget in tokens, and a schedule that keeps its proportions.

A recipe states the paper's number of steps. Another number, by ``--tokens`` or ``--train-iters``,
scales warm-up and decay with it, so that a shortened run is the same schedule in miniature.
Importing this module stays cheap (no torch): launchers use it.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from moa_megatron.recipes import RefusedError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SCALED = ("lr_warmup_iters", "lr_decay_iters", "lr_wsd_decay_iters")
_OTHER_WARM_UPS = ("lr_warmup_fraction", "lr_warmup_samples")
_OTHER_LENGTHS = ("train_samples", "rampup_batch_size", "step_batch_size_schedule")


def tokens(text: str, parameters: int | None) -> int:
    """Tokens of a budget: ``2.6B``, ``300M``, or ``20x`` for 20 tokens per parameter.

    Args:
        text: the value of ``--tokens``.
        parameters: total parameters of the model without gates, so that the baseline and every
            gated mixture of a recipe get the same budget; None where they are not known.

    Raises:
        RefusedError: malformed, not positive, or ``x`` without a known number of parameters.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBTx]?)", str(text).strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise RefusedError(
            f"--tokens {text}: write a number of tokens such as 2.6B or 300M, or tokens per "
            "parameter such as 20x"
        )
    number, unit = float(found[1]), found[2].upper()
    if unit != "X":
        return round(number * _UNITS[unit])
    if parameters is None:
        raise RefusedError(
            f"--tokens {text}: the parameters cannot be counted before vocabulary, width and heads "
            "are known; give --vocab-size, --hidden-size and --num-attention-heads, or the tokens"
        )
    return round(number * parameters)


def short(number: float) -> str:
    """Three digits and a unit, as ``--tokens`` takes them: ``2.62B``, ``154K``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def steps(text: str, parameters: int | None, tokens_per_step: int) -> int:
    """Steps that see at least the budget of ``--tokens``; see ``tokens``."""
    return math.ceil(tokens(text, parameters) / tokens_per_step)


def scaled(recipe: Mapping[str, Any], train_iters: int, given: Collection[str]) -> dict[str, int]:
    """Warm-up and decay for another number of steps, in the recipe's proportions.

    Args:
        recipe: its values, with ``train_iters``.
        train_iters: steps of this run.
        given: destinations that the user has set; they, and what they replace, stay as they are.
    """
    stated = recipe.get("train_iters")
    if not stated or train_iters == stated:
        return {}
    kept = set(given)
    if kept.intersection(_OTHER_WARM_UPS):
        kept.add("lr_warmup_iters")
    found = {
        name: max(1, round(recipe[name] * train_iters / stated))
        for name in _SCALED
        if recipe.get(name) and name not in kept
    }
    if "lr_warmup_iters" in found:
        found["lr_warmup_iters"] = min(found["lr_warmup_iters"], max(0, train_iters - 1))
    return found


def _steps_of_epochs(args: argparse.Namespace, given: Collection[str]) -> int:
    if args.moa_model != "mae" or args.mock_data:
        raise RefusedError(
            f"--epochs {args.epochs:g} counts passes over images: it needs --moa-model mae and no "
            "--mock-data: give --train-iters, or --tokens for text"
        )
    if "train_iters" in given:
        raise RefusedError(f"--epochs {args.epochs:g} with --train-iters: give one of them")
    images = getattr(args, "moa_image_count", 0)
    if not images:
        raise RefusedError(
            f"--epochs {args.epochs:g} needs images that have been counted: run "
            f"tools/index_images.py {' '.join(args.train_data_path)}, or give --train-iters"
        )
    return math.ceil(args.epochs * images / args.global_batch_size)


def apply(
    args: argparse.Namespace,
    recipe: Mapping[str, Any],
    given: Collection[str],
    count: Callable[[], int | None],
) -> None:
    """Sets ``train_iters`` and what follows from it in ``args``.

    Args:
        args: changed in place.
        recipe: the recipe's values.
        given: destinations that the user has set.
        count: total parameters without gates; None where they are not known.

    Raises:
        RefusedError: a malformed budget, or one beside another length of the run.
    """
    if getattr(args, "epochs", None) is not None:
        args.train_iters = _steps_of_epochs(args, given)
    if args.tokens is not None:
        others = [name for name in _OTHER_LENGTHS if getattr(args, name, None) is not None]
        others += ["train_iters"] if "train_iters" in given else []
        if others:
            flags = ", ".join("--" + name.replace("_", "-") for name in others)
            raise RefusedError(f"--tokens {args.tokens} with {flags}: give one of them")
        if not args.global_batch_size or not args.seq_length:
            raise RefusedError(
                f"--tokens {args.tokens} needs --global-batch-size ({args.global_batch_size}) and "
                f"--seq-length ({args.seq_length}) to count steps: give both"
            )
        per_parameter = str(args.tokens).strip().lower().endswith("x")
        total = count() if per_parameter else None
        args.train_iters = steps(args.tokens, total, args.global_batch_size * args.seq_length)
    if args.train_iters is not None:
        for name, value in scaled(recipe, args.train_iters, given).items():
            setattr(args, name, value)
