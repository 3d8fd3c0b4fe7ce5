"""Upstream flags that contradict MoA or the machine; docs/megatron.md has the table of features."""

from __future__ import annotations

import argparse

from moa_megatron import host, installed, packages
from moa_megatron.config import MoAConfig
from moa_megatron.costs import moe_blocks

# Upstream arguments that MoA cannot honour: a predicate on their value, and the reason.
_FUSED = "it fuses fc1, activation and fc2 in one operator, so the activation would not be MoA's"
_CHANGES_ACTIVATION = "it changes the activation itself, which MoA replaces"
FORBIDDEN: dict[str, str] = {
    "use_transformer_engine_op_fuser": _FUSED,
    "use_grouped_gemm_for_dense_mlp": _FUSED,
    "use_grouped_gemm_for_shared_expert": _FUSED,
    "moe_single_grouped_weight": _FUSED,
    "moe_paged_stash": _FUSED,
    "moe_expert_rank_capacity_factor": _FUSED,
    "use_te_activation_func": _CHANGES_ACTIVATION,
    "activation_func_clamp_value": _CHANGES_ACTIVATION,
    "glu_linear_offset": _CHANGES_ACTIVATION,
    "quick_geglu": _CHANGES_ACTIVATION,
    "squared_relu": _CHANGES_ACTIVATION,
    "use_fused_weighted_squared_relu": _CHANGES_ACTIVATION,
    "moe_mlp_glu_interleave_size": "it interleaves y and z in fc1's columns",
    "moe_shared_expert_glu_interleave_size": "it interleaves y and z in fc1's columns",
    "moe_apply_probs_on_input": "the gates would read inputs scaled by routing probabilities",
    "fp4": "gates and mixtures were never tried beside its products",
    "inference_fuse_tp_communication": "its fused MLP knows no gates",
    "use_kitchen": "its MLP classes know no gates",
    "use_megatron_fsdp": "its checkpoint format cannot tell the gates of different experts apart",
    "decoupled_lr": "Megatron marks gates like embeddings, to keep them on AdamW under Muon, "
    "and would give them the decoupled rate too",
}
_SPELLING = {"fp4": "--fp4-format"}
# What --offload-modules would take from within grouped experts, whose gates and coefficients read
# the same tensors in parts: upstream frees the whole under them.
OFFLOADED_INSIDE = ("expert_fc1", "moe_act")
# Layers of HybridModel beyond attention, MLP and MoE, and the package that computes each.
_SPECIAL_LAYERS = {"M": "mamba_ssm", "G": "fla", "D": None, "+": None}


def problems(args: argparse.Namespace, moa: MoAConfig) -> list[str]:
    """Upstream flags that contradict MoA (upstream keeps their meaning with mixing=fixed)."""
    found = []
    for name, reason in FORBIDDEN.items():
        value = getattr(args, name, None)
        if value:
            found.append(f"{flag_of(name)} ({value}) cannot go with MoA: {reason}; leave it out")
    if args.transformer_impl not in ("local", "transformer_engine"):
        found.append(
            f"--transformer-impl {args.transformer_impl} cannot go with MoA: its FFNs are made "
            "for inference and know no gates; use --transformer-impl transformer_engine or local"
        )
    if args.moe_latent_size and moa.gate_scope == "layer":
        found.append(
            f"--moe-latent-size={args.moe_latent_size} with --moa-gate-scope layer: routed experts "
            "see latent vectors, shared experts do not; use --moa-gate-scope expert"
        )
    inside = set(OFFLOADED_INSIDE).intersection(args.offload_modules or ())
    if args.fine_grained_activation_offloading and inside:
        found.append(
            f"--offload-modules {' '.join(sorted(inside))} cannot go with MoA: experts' gates read "
            "parts of tensors that it frees; leave these out"
        )
    if args.moa_log_interval:
        found += log_interval_problems(args)
    found += layer_wise_problems(args, moa)
    return found + _expert_overlap_problems(args) + _shared_overlap_problems(args)


def flag_of(name: str) -> str:
    """How the flag of an upstream argument is spelt."""
    return _SPELLING.get(name, "--" + name.replace("_", "-"))


def layer_wise_problems(args: argparse.Namespace, moa: MoAConfig) -> list[str]:
    """Gates of experts, which stay on AdamW, beside Muon's matrices in a layer-wise optimiser.

    Source: the assertion on expert groups in ``megatron.core.optimizer``'s emerging path.
    """
    tp = args.tensor_model_parallel_size
    apart = args.expert_model_parallel_size > 1 or (args.expert_tensor_parallel_size or tp) != tp
    if (
        args.optimizer != "muon"
        or not (args.use_distributed_optimizer and args.use_layer_wise_param_layout)
        or not (args.num_experts and apart and moa.gate_scope == "expert")
    ):
        return []
    return [
        "--use-distributed-optimizer with Muon cannot cut the gates of experts that have ranks of "
        "their own: use --moa-gate-scope layer, or add --no-use-layer-wise-param-layout"
    ]


def log_interval_problems(args: argparse.Namespace) -> list[str]:
    """Why layers cannot show statistics: the code that gathers them would not run, or too late."""
    reasons = {
        "cuda_graph_impl": "a replayed graph does not run the code that gathers statistics",
        "enable_cuda_graph": "a replayed graph does not run the code that gathers statistics",
        "external_cuda_graph": "a replayed graph does not run the code that gathers statistics",
        "overlap_moe_expert_parallel_comm": "its schedule runs forwards of layers among backwards",
    }
    return [
        f"--moa-log-interval with --{name.replace('_', '-')} cannot go together: {reason}; use "
        "--moa-log-interval 0, or leave the other out"
        for name, reason in reasons.items()
        if getattr(args, name, None) not in (None, False, "none")
    ]


def _expert_overlap_problems(args: argparse.Namespace) -> list[str]:
    """The schedule that overlaps expert communication frees FFN inputs it takes for copied."""
    if not args.overlap_moe_expert_parallel_comm:
        return []
    flag, found = "--overlap-moe-expert-parallel-comm", []
    if args.transformer_impl != "transformer_engine":
        found.append(
            f"{flag} with MoA needs --transformer-impl transformer_engine: add it, or leave it out"
        )
    if args.moa_model != "gpt":
        found.append(f"{flag}: HybridModel has no schedule for it; add --moa-model gpt")
    if args.fp8:
        found.append(
            f"{flag} with --fp8-format cannot go with MoA: it frees the input that the gates keep "
            "for their gradient; leave one of them out"
        )
    backend = args.moe_flex_dispatcher_backend
    if args.moe_token_dispatcher_type == "flex" and backend in ("hybridep", "ncclep"):
        found.append(
            f"{flag} with --moe-flex-dispatcher-backend {backend} is untried with MoA: experts "
            "read the very tensor it may free; use --moe-token-dispatcher-type alltoall"
        )
    return found


def _shared_overlap_problems(args: argparse.Namespace) -> list[str]:
    """Where shared experts beside the dispatcher would go wrong, or end in an assertion."""
    if not args.moe_shared_expert_overlap:
        return []
    flag, found, graphs = "--moe-shared-expert-overlap", [], args.cuda_graph_impl
    # Two old switches, which Megatron translates later.
    graphs = "transformer_engine" if getattr(args, "external_cuda_graph", False) else graphs
    graphs = "local" if getattr(args, "enable_cuda_graph", False) else graphs
    chosen = (*(args.cuda_graph_modules or ()), *(args.cuda_graph_scope_deprecated or ()))
    captured = {getattr(module, "name", module) for module in chosen}
    # Graphs of Megatron's own take the preprocessing in with the router.
    names = {"moe_preprocess"} | ({"moe_router"} if graphs == "local" else set())
    if graphs != "none" and captured & names:
        found.append(
            f"{flag} with --cuda-graph-modules {' '.join(sorted(captured & names))} cannot go with "
            "MoA: a graph that ends before the experts leaves out the gates of shared experts; "
            "leave these out"
        )
    if args.moe_latent_size:
        found.append(
            f"{flag} with --moe-latent-size={args.moe_latent_size}: Megatron has no such path in "
            "training; leave one of them out"
        )
    if args.transformer_impl == "transformer_engine" and not args.moe_grouped_gemm:
        found.append(
            f"{flag} with sequential experts on Transformer Engine, whose products share one "
            "workspace on both streams: add --moe-grouped-gemm"
        )
    return found


def _fp8_width_problems(args: argparse.Namespace) -> list[str]:
    """Widths that FP8 products refuse once they run.

    Source: ``assert_dim_for_fp8_exec`` in Transformer Engine; blocks of MXFP8 have 32 elements.
    """
    if not getattr(args, "fp8", None):
        return []
    unit = 32 if args.fp8_recipe == "mxfp8" else 16
    tp = args.tensor_model_parallel_size
    expert_tp = args.expert_tensor_parallel_size or tp
    pattern = args.hybrid_layer_pattern
    dense = "-" in pattern if pattern else not all(moe_blocks(args))
    widths = {"hidden_size": (args.hidden_size, 1), "moe_latent_size": (args.moe_latent_size, 1)}
    if dense:
        widths["ffn_hidden_size"] = (args.ffn_hidden_size, tp)
    if args.num_experts:
        widths["moe_ffn_hidden_size"] = (args.moe_ffn_hidden_size, expert_tp)
        widths["moe_shared_expert_intermediate_size"] = (
            args.moe_shared_expert_intermediate_size,
            tp,
        )
    found = []
    for name, (width, ranks) in widths.items():
        multiple = unit * ranks
        if width and width % multiple:
            each = f" ({unit} a tensor-parallel rank)" if ranks > 1 else ""
            rounded = name not in ("hidden_size", "moe_latent_size")
            cure = f"; add --moa-align {max(64, multiple)}" if rounded else ""
            found.append(
                f"--fp8-format {args.fp8} with {name}={width}: FP8 products need multiples of "
                f"{multiple}{each}{cure}"
            )
    return found


def _local_norm_problems(args: argparse.Namespace) -> list[str]:
    """Local modules have torch's norms, which upstream lets no sequence-parallel model have.

    The host's variant may; Apex's LayerNorm too. Source: ``WrappedTorchNorm``.
    """
    if args.transformer_impl != "local" or not args.sequence_parallel or host.active():
        return []
    apex = packages.importable("apex.normalization")
    if apex and args.moa_model == "gpt" and args.normalization == "LayerNorm":
        return []
    return [
        "--sequence-parallel with --transformer-impl local on a GPU: Megatron's norms there refuse "
        "it; use --transformer-impl transformer_engine, or --tensor-model-parallel-size 1"
    ]


def machine_problems(args: argparse.Namespace) -> list[str]:
    """What the chosen modules need and this machine lacks, whatever the FFN."""
    found = []
    apex = packages.apex_problem()
    if apex is not None:
        found.append(apex)
    engine = args.transformer_impl == "transformer_engine"
    reason = installed.transformer_engine_problem() if engine else None
    if reason is not None:
        found.append(f"--transformer-impl transformer_engine cannot run here: {reason}")
    found += _fp8_width_problems(args) + _local_norm_problems(args)
    if args.overlap_dispatch_backward_with_experts_wgrad and not args.gradient_accumulation_fusion:
        # TEGroupedLinear.backward_dw sets ``grad``; DistributedDataParallel hears of it with
        # --delay-wgrad-compute alone.
        found.append(
            "--overlap-dispatch-backward-with-experts-wgrad without gradient accumulation fusion "
            "loses gradients of experts: leave it out, or use an image with NVIDIA's Apex "
            "(fused_weight_gradient_mlp_cuda)"
        )
    for symbol in sorted(set(args.hybrid_layer_pattern or "").intersection(_SPECIAL_LAYERS)):
        package = _SPECIAL_LAYERS[symbol]
        what = f"--hybrid-layer-pattern has a layer {symbol}"
        if not engine:
            found.append(
                f"{what}, which Megatron has on Transformer Engine only; local modules build *, - "
                "and E: use --transformer-impl transformer_engine"
            )
        elif package is not None and not packages.importable(package):
            found.append(f"{what}, which needs the package {package}: install it")
    return found
