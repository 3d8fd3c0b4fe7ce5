"""Recipe + flags -> Megatron's argument namespace.

Needs Megatron (and host mode, where there is no CUDA) to be importable already.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from megatron.training.arguments import parse_args

from moa_megatron import checkpoints, derive, recipes
from moa_megatron.config import MoAConfig, add_moa_arguments, moa_config_from_args, nearest
from moa_megatron.data.once import default_cache
from moa_megatron.recipes import CommandLine, RefusedError
from moa_megatron.vision.settings import add_vision_arguments
from moa_megatron.vision.settings import derive as derive_vision

_CHOICES = {
    "moa_model": ("hybrid", "gpt", "mae"),
    "moa_corpus": ("none", "stdlib", "digits"),
}
# Megatron takes one of several arguments; the user's flag displaces the recipe's choice.
_ALTERNATIVES: dict[str, tuple[tuple[str, ...], Any]] = {
    "lr_warmup_fraction": (("lr_warmup_iters", "lr_warmup_samples"), None),
    "lr_warmup_iters": (("lr_warmup_fraction", "lr_warmup_samples"), 0),
    "train_iters": (("train_samples",), None),
}
_OF_MIXTURES = ("moa_variant", "moa_gate", "moa_dictionary", "moa_gate_scope", "moa_gate_init_std")


@dataclass(frozen=True)
class Parsed:
    """A namespace before Megatron's own validation, and where its values come from.

    Attributes:
        args: Megatron's namespace.
        moa: settings of the method.
        recipe: the recipe's values for the variant in force.
        given: destinations that the user has set by flags or ``--set``.
    """

    args: argparse.Namespace
    moa: MoAConfig
    recipe: dict[str, Any]
    given: set[str]


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The project's own flags, beside Megatron's."""
    add_moa_arguments(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--moa-model", default="hybrid", help="model class: hybrid | gpt | mae")
    group.add_argument(
        "--moa-corpus",
        default="none",
        help="embedded corpus where no data path is given: none | stdlib (Python's own source) | "
        "digits (images of handwritten digits, for mae)",
    )
    group.add_argument(
        "--moa-align",
        type=int,
        default=1,
        metavar="N",
        help="round FFN widths up to multiples of N; 64 suits FP8 and tensor parallelism",
    )
    group.add_argument(
        "--tokens",
        metavar="BUDGET",
        help="train on this many tokens: 2.6B, 300M, or 20x for 20 per parameter; warm-up and "
        "decay keep the recipe's proportions (default: the recipe's train_iters)",
    )
    group.add_argument(
        "--accept-data-change",
        action="store_true",
        help="continue from a checkpoint although data, blend, split, sequence length, seed or "
        "tokenizer are not those it was trained on",
    )
    group.add_argument(
        "--moa-min-lr-fraction",
        type=float,
        metavar="F",
        help="lowest learning rate as a fraction of the peak, where --min-lr is not given",
    )
    group.add_argument(
        "--moa-muon-split-fc1",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Muon takes W1 and W2, which Megatron keeps in one matrix, as two (default: yes)",
    )
    group.add_argument(
        "--moa-scaled-init",
        action="store_true",
        help="scale output projections by depth, as Megatron does; the paper does not",
    )
    group.add_argument(
        "--moa-log-interval",
        type=int,
        default=None,
        metavar="N",
        help="gate statistics and ranges of every layer to TensorBoard every N steps (default "
        f"{derive.LOG_INTERVAL}); 0: never",
    )
    group.add_argument(
        "--moa-cache-dir",
        default=str(default_cache()),
        help="prepared corpora and their indices (default: under XDG_CACHE_HOME or ~/.cache)",
    )
    add_vision_arguments(parser)
    return parser


def parse(command: CommandLine, extra_flags: list[str]) -> Parsed:
    """Recipe and flags as Megatron's namespace, with what follows from them filled in.

    Args:
        command: what the user asked for.
        extra_flags: flags that the machine needs; the user's stand behind them.

    Raises:
        RefusedError: for unknown keys and flags, bad values and contradictions.
    """
    stated = recipes.load(command.recipe) if command.recipe else {}
    recipe = recipes.of_variant(stated, command.settings, command.flags)
    args, given = _parse(command, recipe, extra_flags)
    args.moa_recipe = command.recipe
    for name, (others, off) in _ALTERNATIVES.items():
        if name not in given and given.intersection(others):
            setattr(args, name, off)
    checkpoints.continue_run(args, given, command.run_dir)
    if args.use_checkpoint_args:
        checkpoints.restore(args, given)
        variant = {"moa_mixing": args.moa_mixing, "moa_variant": args.moa_variant}
        restored = recipes.of_variant(stated, {**command.settings, **variant}, [])
        # What the recipe has for the checkpoint's variant comes along.
        fresh, _ = _parse(command, restored, extra_flags)
        for name in {key for key in restored if restored[key] != recipe.get(key)} - given:
            setattr(args, name, getattr(fresh, name))
        recipe = restored
    for name, known in _CHOICES.items():
        value = getattr(args, name)
        if value not in known:
            flag = "--" + name.replace("_", "-")
            choices = ", ".join(known)
            hint = nearest(value, known) or "."
            raise RefusedError(f"{flag} {value} is unknown{hint} Choose from {choices}")
    try:
        moa = moa_config_from_args(args)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    ignored = given.intersection(_OF_MIXTURES)
    if moa.mixing == "fixed" and ignored:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(ignored))
        raise RefusedError(
            f"{flags} with --moa-mixing fixed: Megatron's own flags choose a fixed activation; the "
            "Type-I baseline is --set swiglu=false --squared-relu with --ffn-hidden-size 4d"
        )
    derive.ffn(args, moa, given, gated_recipe=bool(recipe.get("swiglu")))
    derive.align(args)
    derive.pattern(args)
    if args.moa_model == "mae":
        derive_vision(args, moa, given, gated_recipe=bool(recipe.get("swiglu")))
    derive.modules(args, given)
    derive.fp8_recipe(args, moa, "fp8_recipe" in given or "fp8_recipe" in recipe)
    derive.log_interval(args)
    derive.min_lr(args, given)
    return Parsed(args, moa, recipe, given)


def _parse(
    command: CommandLine, recipe: dict[str, Any], extra_flags: list[str]
) -> tuple[argparse.Namespace, set[str]]:
    """The namespace, and the destinations of what the user himself has set."""
    given: set[str] = set()

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_arguments(parser)
        recipes.refuse_on_error(parser)
        recipes.set_defaults(parser, recipe, command.settings)
        given.update(recipes.given_arguments(parser, command.flags, command.settings))
        return parser

    argv, sys.argv = sys.argv, [sys.argv[0], *extra_flags, *command.flags]
    if command.help_all:
        sys.argv.append("--help")
    try:
        return parse_args(provider), given
    finally:
        sys.argv = argv
