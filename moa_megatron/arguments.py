"""Recipe + flags -> Megatron's argument namespace, with what MoA derives from it.

Needs Megatron (and host mode, where there is no CUDA) to be importable already.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from megatron.training.arguments import parse_args

from moa_megatron import recipes
from moa_megatron.config import MoAConfig, add_moa_arguments, moa_config_from_args, nearest
from moa_megatron.recipes import CommandLine, RefusedError

_CHOICES = {
    "moa_model": ("hybrid", "gpt"),
    "moa_corpus": ("none", "stdlib"),
}
# Shape arguments which Megatron takes from a checkpoint only where they are still unset; a recipe's
# values must not stand in the way of --use-checkpoint-args.
_FROM_CHECKPOINT_IF_UNSET = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "seq_length",
    "num_attention_heads",
    "kv_channels",
    "max_position_embeddings",
    "padded_vocab_size",
)
# Megatron takes one of several arguments; the user's flag displaces the recipe's choice.
_ALTERNATIVES: dict[str, tuple[tuple[str, ...], Any]] = {
    "lr_warmup_fraction": (("lr_warmup_iters", "lr_warmup_samples"), None),
    "lr_warmup_iters": (("lr_warmup_fraction", "lr_warmup_samples"), 0),
    "train_iters": (("train_samples",), None),
}
_MOA_SHAPE = ("mixing", "variant", "gate", "dictionary", "gate_scope", "leaky_slope")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The project's own flags, beside Megatron's."""
    add_moa_arguments(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--moa-model", default="hybrid", help="HybridModel or GPTModel (hybrid | gpt)"
    )
    group.add_argument(
        "--moa-corpus",
        default="none",
        help="embedded corpus where no data path is given: none | stdlib (Python's own source)",
    )
    group.add_argument(
        "--moa-scaled-init",
        action="store_true",
        help="scale output projections by depth, as Megatron does; the paper does not",
    )
    group.add_argument(
        "--moa-cache-dir",
        default=str(Path.home() / ".cache" / "moa_megatron"),
        help="prepared corpora and their indices",
    )
    return parser


def parse(command: CommandLine, extra_flags: list[str]) -> tuple[argparse.Namespace, MoAConfig]:
    """Megatron's namespace before its own validation, and the settings of the method.

    Args:
        command: what the user asked for.
        extra_flags: flags that the machine needs; the user's stand behind them.

    Raises:
        RefusedError: for unknown keys and flags, bad values and contradictions.
    """
    given: set[str] = set()

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_arguments(parser)
        recipes.refuse_on_error(parser)
        recipe = recipes.load(command.recipe) if command.recipe else {}
        recipes.set_defaults(parser, recipe, command.settings)
        given.update(recipes.given_arguments(parser, command.flags))
        by_name = recipes._actions_by_name(parser)
        given.update(by_name[key.replace("-", "_")].dest for key in command.settings)
        return parser

    argv, sys.argv = sys.argv, [sys.argv[0], *extra_flags, *command.flags]
    if command.help_all:
        sys.argv.append("--help")
    try:
        args = parse_args(provider)
    finally:
        sys.argv = argv
    args.moa_recipe = command.recipe
    for name, (others, off) in _ALTERNATIVES.items():
        if name not in given and given.intersection(others):
            setattr(args, name, off)
    if args.use_checkpoint_args:
        restore_from_checkpoint(args, given)
    for name, known in _CHOICES.items():
        value = getattr(args, name)
        if value not in known:
            flag = "--" + name.replace("_", "-")
            raise RefusedError(f"{flag} {value} is unknown{nearest(value, known)} Choose {known}")
    try:
        moa = moa_config_from_args(args)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    _derive_ffn(args, moa, given)
    _derive_pattern(args)
    _choose_modules(args, given)
    return args, moa


def _derive_ffn(args: argparse.Namespace, moa: MoAConfig, given: set[str]) -> None:
    """Type-I has two matrices where Type-II has three: 4d, and 1.5x the widths of experts."""
    if moa.mixing == "fixed":
        return
    if moa.gated != bool(args.swiglu) and "swiglu" in given:
        raise RefusedError(
            f"--moa-variant {moa.variant} needs {'--swiglu' if moa.gated else 'an ungated FFN'}, "
            f"but swiglu={bool(args.swiglu)} was asked for; leave swiglu to the variant"
        )
    if moa.gated or not args.swiglu:
        args.swiglu = moa.gated
        return
    args.swiglu = False
    if "ffn_hidden_size" not in given:
        args.ffn_hidden_size = 4 * args.hidden_size
    for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        if getattr(args, name) is not None and name not in given:
            setattr(args, name, int(1.5 * getattr(args, name)))


def _derive_pattern(args: argparse.Namespace) -> None:
    """HybridModel's layer pattern from Megatron's GPT arguments; bars are virtual stages.

    A block of GPTModel is two layers of HybridModel: attention ``*``, then ``-`` (dense) or ``E``.
    """
    if args.moa_model == "gpt":
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
    size = args.num_layers_per_virtual_pipeline_stage or len(blocks)
    if args.num_virtual_stages_per_pipeline_rank is not None:
        stages = args.num_virtual_stages_per_pipeline_rank * args.pipeline_model_parallel_size
        size = max(1, len(blocks) // stages)
    main = "|".join("".join(blocks[i : i + size]) for i in range(0, len(blocks), size))
    args.hybrid_layer_pattern = "/".join([main, *extra])
    args.num_layers_per_virtual_pipeline_stage = None
    args.num_virtual_stages_per_pipeline_rank = None


def moe_blocks(args: argparse.Namespace) -> list[bool]:
    """For each transformer block whether its FFN is a mixture of experts."""
    if args.num_experts is None:
        return [False] * args.num_layers
    if isinstance(args.moe_layer_freq, int):
        return [i % args.moe_layer_freq == 0 for i in range(args.num_layers)]
    return [bool(flag) for flag in args.moe_layer_freq]


def _choose_modules(args: argparse.Namespace, given: set[str]) -> None:
    """Transformer Engine is Megatron's default; without it the local modules serve, unfused.

    Megatron turns these fusions on whether or not the extension that holds them is installed.
    """
    have_te = _importable("transformer_engine")
    if args.transformer_impl == "transformer_engine" and "transformer_impl" not in given:
        args.transformer_impl = "transformer_engine" if have_te else "local"
    if args.transformer_impl != "local":
        return
    for name, off, extension in (
        ("gradient_accumulation_fusion", False, "fused_weight_gradient_mlp_cuda"),
        ("masked_softmax_fusion", False, "scaled_upper_triang_masked_softmax_cuda"),
        ("apply_rope_fusion", False, "transformer_engine"),
        ("no_persist_layer_norm", True, "apex.normalization"),
    ):
        if name not in given and not _importable(extension):
            setattr(args, name, off)


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a missing parent, or host mode hides it
        return False


def restore_from_checkpoint(args: argparse.Namespace, given: set[str]) -> None:
    """``--use-checkpoint-args``: shapes and MoA settings come back from the checkpoint.

    Raises:
        RefusedError: where a flag on the command line contradicts the checkpoint.
    """
    for name in _FROM_CHECKPOINT_IF_UNSET:
        if name not in given:
            setattr(args, name, None)
    saved = read_checkpoint_args(args, apply=True)
    if saved is None:
        raise RefusedError(f"--use-checkpoint-args: no checkpoint to read in --load {args.load}")
    differences = []
    for field in dataclasses.fields(MoAConfig):
        name = "moa_" + field.name
        if not hasattr(saved, name):
            continue
        old = getattr(saved, name)
        if name not in given or field.name not in _MOA_SHAPE:
            setattr(args, name, old)
        elif _plain(getattr(args, name)) != _plain(old):
            differences.append(f"{name}: checkpoint {old!r}, command line {getattr(args, name)!r}")
    if differences:
        raise RefusedError("flags contradict the checkpoint: " + "; ".join(differences))
    if "moa_model" not in given and hasattr(saved, "moa_model"):
        args.moa_model = saved.moa_model
    if args.hybrid_layer_pattern is not None:
        # Bars belong to the pipeline layout of the run that saved it, not to the model.
        args.hybrid_layer_pattern = args.hybrid_layer_pattern.replace("|", "")


def read_checkpoint_args(args: argparse.Namespace, apply: bool = False) -> Any | None:
    """The namespace stored in the checkpoint at ``args.load``, or None where there is none."""
    from megatron.training.checkpointing import load_args_from_checkpoint

    if args.load is None:
        return None
    result = load_args_from_checkpoint(args if apply else copy.copy(args))
    return result[1] if isinstance(result, tuple) else None


def architecture_differences(args: argparse.Namespace, saved: Any) -> list[str]:
    """Fields in which a checkpoint describes another model than ``args``, old value first."""
    names = [
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "ffn_hidden_size",
        "num_experts",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "swiglu",
        "normalization",
        "untie_embeddings_and_output_weights",
        "vocab_size",
    ]
    if saved_mixing(saved) != "fixed" or args.moa_mixing != "fixed":
        names += ["moa_" + name for name in _MOA_SHAPE]
    found = []
    for name in names:
        old, new = getattr(saved, name, None), getattr(args, name, None)
        if _plain(old) != _plain(new):
            found.append(f"{name}: checkpoint {old}, this run {new}")
    old_pattern, new_pattern = _pattern(saved), _pattern(args)
    if old_pattern != new_pattern and None not in (old_pattern, new_pattern):
        found.append(f"layers: checkpoint {old_pattern}, this run {new_pattern}")
    return found


def saved_mixing(saved: Any) -> str:
    """The mixing of a saved run; a checkpoint of plain Megatron is a fixed one."""
    return str(getattr(saved, "moa_mixing", "fixed"))


def _pattern(args: Any) -> str | None:
    pattern = getattr(args, "hybrid_layer_pattern", None)
    return pattern.replace("|", "") if pattern else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
