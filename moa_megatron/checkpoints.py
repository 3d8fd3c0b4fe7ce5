"""Checkpoints as arguments: continuing a run folder, restoring settings, telling models apart."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

from moa_megatron import identity, moves, runstate, scales
from moa_megatron.config import MoAConfig, moa_config_from_args
from moa_megatron.recipes import RefusedError

logger = logging.getLogger(__name__)

# Shape arguments which Megatron takes from a checkpoint only where they are still unset; a recipe's
# values must not stand in the way of --use-checkpoint-args.
_TAKEN_IF_UNSET = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "seq_length",
    "num_attention_heads",
    "kv_channels",
    "max_position_embeddings",
    "padded_vocab_size",
)
# Fields of MoAConfig that say which function a model computes, and so what its weights mean.
_OF_THE_MODEL = ("mixing", "variant", "gate", "dictionary", "gate_scope", "leaky_slope")
_SHAPE = (
    "moa_model",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "mtp_num_layers",
    "swiglu",
    "normalization",
    "add_bias_linear",
    "position_embedding_type",
    "untie_embeddings_and_output_weights",
    "vocab_size",
)
# The same of masked autoencoders alone: other checkpoints need not have these fields.
_SHAPE_OF_IMAGES = (
    "img_h",
    "img_w",
    "patch_dim",
    "mae_decoder_layers",
    "mae_decoder_width",
    "mae_decoder_heads",
    "mae_decoder_ffn",
)
# How a first start may differ from a continued one.
_OF_A_FIRST_START = ("finetune", "no_load_optim", "no_load_rng", "ckpt_step")


def continue_run(args: argparse.Namespace, given: set[str], folder: Path) -> None:
    """Where the run saves, and that it loads from there once it has saved.

    ``--load`` and ``--finetune`` say how a run starts for the first time: repeating the command
    must not start it again over its own checkpoints.

    Raises:
        RefusedError: where the folder holds checkpoints without a readable step.
    """
    if args.save is None and "save" not in given:
        args.save = str(folder / "checkpoints")
    if args.save is None:
        return
    try:
        step = runstate.checkpoint_step(Path(args.save))
    except ValueError as error:
        raise RefusedError(str(error)) from error
    if step is None:
        return
    if runstate.repair_tracker(Path(args.save), step):
        logger.warning("%s named no step; its newest complete checkpoint is %d", args.save, step)
    overruled = [name for name in _OF_A_FIRST_START if getattr(args, name)]
    if args.load not in (None, args.save):
        overruled.append("load")
    if overruled:
        flags = ", ".join("--" + name.replace("_", "-") for name in overruled)
        logger.info("continuing at step %d of %s: %s only starts a run", step, args.save, flags)
    args.load, args.ckpt_step = args.save, None
    args.finetune = args.no_load_optim = args.no_load_rng = False


def restore(args: argparse.Namespace, given: set[str]) -> None:
    """``--use-checkpoint-args``: shapes and MoA settings come back from the checkpoint.

    Raises:
        RefusedError: where a flag on the command line contradicts the checkpoint.
    """
    asked = {name: getattr(args, name) for name in _SHAPE if name in given}
    for name in _TAKEN_IF_UNSET:
        if name not in given:
            setattr(args, name, None)
    saved = read_args(args, apply=True)
    if saved is None:
        raise RefusedError(f"--use-checkpoint-args: no checkpoint to read in --load {args.load}")
    differences = [
        f"{name}: checkpoint {getattr(saved, name)!r}, command line {value!r}"
        for name, value in asked.items()
        if getattr(saved, name, value) != value
    ]
    for field in dataclasses.fields(MoAConfig):
        name = "moa_" + field.name
        if not hasattr(saved, name):
            continue
        old, new = getattr(saved, name), getattr(args, name)
        if name not in given:
            setattr(args, name, old)
        elif field.name in _OF_THE_MODEL and _plain(new) != _plain(old):
            differences.append(f"{name}: checkpoint {old!r}, command line {new!r}")
    if differences:
        raise RefusedError("flags contradict the checkpoint: " + "; ".join(differences))
    for name in ("moa_model", "vocab_size", *_SHAPE_OF_IMAGES):
        if name not in given and hasattr(saved, name):
            setattr(args, name, getattr(saved, name))
    if args.hybrid_layer_pattern is not None:
        # Bars belong to the pipeline layout of the run that saved it, not to the model.
        args.hybrid_layer_pattern = args.hybrid_layer_pattern.replace("|", "")


def read_args(args: argparse.Namespace, apply: bool = False) -> Any | None:
    """The namespace stored in the checkpoint at ``args.load``, or None where there is none."""
    from megatron.training.checkpointing import load_args_from_checkpoint

    if args.load is None:
        return None
    result = load_args_from_checkpoint(args if apply else copy.copy(args))
    return result[1] if isinstance(result, tuple) else None


def problems(args: argparse.Namespace) -> list[str]:
    """A checkpoint of another architecture, of other data, or of another optimiser's path.

    After Megatron's validation, with the run's identity of data in place.
    """
    if args.load is None:
        return []
    saved = read_args(args)
    if saved is None:
        return [f"--load {args.load} holds no checkpoint that can be read"]
    others = identity.problems(args, saved) + optimizer_problems(args, saved)
    others += scales.problems(args, saved)
    found = differences(args, saved)
    if not found:
        if not others:
            moves.prepare(args, saved)
            scales.allow_own(args, saved)
        return others
    baseline = moves.saved_moa(saved).mixing == "fixed" and not args.finetune
    start = ", or start a mixture from a baseline's weights with --finetune" if baseline else ""
    return [
        f"the checkpoint in {args.load} is another model: " + "; ".join(found) + ". Load it with "
        f"the settings it was trained with (--use-checkpoint-args){start}, or choose another "
        "--run-dir",
        *others,
    ]


def differences(args: argparse.Namespace, saved: Any) -> list[str]:
    """Fields in which a checkpoint describes another model than ``args``, old value first."""
    moved = moves.to_hybrid(args, saved)
    left_out = {"num_query_groups"}
    if moved or not hasattr(saved, "moa_model"):  # plain Megatron's has no such field
        left_out.add("moa_model")
    names = [name for name in _SHAPE if name not in left_out]
    pairs = [(name, getattr(saved, name, None), getattr(args, name, None)) for name in names]
    pairs.append(("num_query_groups", _query_groups(saved), _query_groups(args)))
    if args.moa_model == "mae":
        images = _SHAPE_OF_IMAGES
        pairs += [(name, getattr(saved, name, None), getattr(args, name)) for name in images]
    if not moved:
        pairs.append(("layers", _layers(saved), _layers(args)))
    old, new = moves.saved_moa(saved), moa_config_from_args(args)
    if old.mixing != new.mixing:
        if not moves.starts_gates(args, saved):
            pairs.append(("moa_mixing", old.mixing, new.mixing))
    elif old.mixing != "fixed":
        pairs += [("moa_variant", old.variant, new.variant), ("dictionary", old.names, new.names)]
        pairs += [("moa_gate", old.gate, new.gate)] if old.mixing == "moa" else []
        pairs += [("moa_gate_scope", old.gate_scope, new.gate_scope)] if args.num_experts else []
        pairs.append(("moa_leaky_slope", old.leaky_slope, new.leaky_slope))
    return [
        f"{name}: checkpoint {_plain(old)}, this run {_plain(new)}"
        for name, old, new in pairs
        if _plain(old) != _plain(new)
    ]


def _query_groups(args: Any) -> int | None:
    """Groups of keys and values; Megatron fills an unused field in while it trains."""
    grouped = getattr(args, "group_query_attention", False)
    return getattr(args, "num_query_groups" if grouped else "num_attention_heads", None)


def optimizer_problems(args: argparse.Namespace, saved: Any) -> list[str]:
    """Where the state of the optimiser or the schedule could not be continued, or not as it was.

    Megatron would stop at the first two kinds after the model is built, in its optimiser's
    ``_filter_and_reorder_param_groups`` and in ``OptimizerParamScheduler.load_state_dict``.
    """
    if args.finetune or args.no_load_optim or args.skip_train or not hasattr(saved, "lr"):
        return []
    problems = []
    rates = _differing(("lr", "min_lr"), vars(saved), vars(args))
    if rates:
        problems.append(
            f"the optimiser's state in {args.load} belongs to other learning rates: {rates}. Give "
            "the checkpoint's, or start a new run from its weights: --finetune with another "
            "--run-dir"
        )
    old, new = _schedule(saved), _schedule(args)
    shapes = _differing(tuple(new), old, new)
    told = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
    if shapes and not told:
        problems.append(
            f"the schedule differs from the checkpoint's in {args.load}: {shapes}. Add "
            "--override-opt-param-scheduler to go on with this run's, or "
            "--use-checkpoint-opt-param-scheduler to keep the checkpoint's"
        )
    if args.optimizer == saved.optimizer == "muon":
        before = {"moa_muon_split_fc1": False, **vars(saved)}
        muon = _differing(("muon_split_qkv", "moa_muon_split_fc1"), before, vars(args))
        if muon:
            problems.append(
                f"Muon would take other matrices than in {args.load}: {muon}. Keep what the "
                "checkpoint was trained with, by --set NAME=VALUE for each, or start a new run "
                "from its weights: --finetune with another --run-dir"
            )
    return problems


def _schedule(args: Any) -> dict[str, Any]:
    """What Megatron's scheduler compares, in samples (``get_optimizer_param_scheduler``)."""
    size = args.global_batch_size
    if args.train_samples:
        decay, warmup = args.lr_decay_samples or args.train_samples, args.lr_warmup_samples
    else:
        decay = (args.lr_decay_iters or args.train_iters or 0) * size
        warmup = args.lr_warmup_iters * size
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    return {
        "samples of the whole schedule": decay,
        "samples of warm-up": warmup,
        "lr_decay_style": args.lr_decay_style,
        "start_weight_decay": args.start_weight_decay,
        "end_weight_decay": args.end_weight_decay,
    }


def _differing(names: tuple[str, ...], old: dict[str, Any], new: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: checkpoint {old.get(name)}, this run {new.get(name)}"
        for name in names
        if old.get(name) != new.get(name)
    )


def moe_norm_has_dense_name(args: argparse.Namespace) -> bool:
    """Whether the checkpoint to load names the norms of MoE layers like those of dense layers.

    Megatron's local GPT layers do, and so did MoA's first version on them; a run that starts from
    such a checkpoint keeps the names, so that its own checkpoints agree with its optimiser's state.
    """
    from megatron.core.dist_checkpointing import check_is_distributed_checkpoint
    from megatron.core.dist_checkpointing.serialization import load_tensors_metadata

    if args.load is None or args.num_experts is None:
        return False
    tracker = Path(args.load) / "latest_checkpointed_iteration.txt"
    step = str(args.ckpt_step or (tracker.read_text("utf-8").strip() if tracker.is_file() else ""))
    folder = Path(args.load, f"iter_{int(step):07d}" if step.isdigit() else step)
    if not step or not check_is_distributed_checkpoint(str(folder)):
        return False
    names = set(load_tensors_metadata(str(folder)))
    routers = [name for name in names if name.endswith(".mlp.router.weight")]
    dense = [name.replace(".router.", ".linear_fc1.layer_norm_") for name in routers]
    return any(name in names for name in dense)


def _layers(args: Any) -> Any:
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern:
        return pattern.replace("|", "")
    return (args.num_layers, _plain(getattr(args, "moe_layer_freq", None)))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
