"""Builds the models of ``cases`` in a process of the pool. Host mode must be on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from moa_megatron import muon
from moa_megatron.gates import MoAGate
from moa_megatron.grouped_linear import MoAGroupedGate
from moa_megatron.local_specs import local_hybrid_stack_spec
from moa_megatron.specs import with_moa
from tests.helpers import mae
from tests.helpers.cases import EXPERTS, SEQUENCE, VOCABULARY, Layout, Model

SEED = 1234
_LAYERS = 4
_MOE = {
    "num_moe_experts": EXPERTS,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 12,
    "moe_shared_expert_intermediate_size": 20,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
}
# Megatron wants 16 bits for these; in 32 they can be held to float32's rounding.
_UNCHECKED = ("overlap_moe_expert_parallel_comm", "delay_wgrad_compute")


@contextmanager
def model_parallel(layout: Layout) -> Iterator[None]:
    """Megatron's process groups and random streams for one layout."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
    )
    seed = SEED + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def transformer_config(model: Model, layout: Layout) -> TransformerConfig:
    """Four layers in float32 without dropout, fused kernels or biases."""
    gated = model.moa.gated
    values: dict[str, Any] = {
        "num_layers": _LAYERS,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 24,
        "gated_linear_unit": gated,
        "activation_func": F.silu if gated else F.gelu,
        "bias_activation_fusion": False,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "init_method_std": 0.1,
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.sp,
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "pipeline_dtype": torch.float32,
        # As Megatron's arguments demand where two stages interleave: batched, the messages of both
        # directions would be mistaken for each other.
        "overlap_p2p_comm": layout.vpp > 1,
        "batch_p2p_comm": layout.vpp == 1,
    }
    values |= _MOE if model.moe else {}
    # Options are tuples where Megatron wants lists, so that a model can be a key.
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in model.options}
    unchecked = {name: options.pop(name) for name in _UNCHECKED if name in options}
    config = TransformerConfig(**(values | options))
    for name, value in unchecked.items():
        setattr(config, name, value)
    return config


def _pattern(model: Model, layout: Layout) -> str:
    """Attention and feedforward layers in turn, with a bar between pipeline stages."""
    layers = ("*E" if model.moe else "*-") * (_LAYERS // 2)
    stage = _LAYERS // (layout.pp * layout.vpp)
    return "|".join(layers[first : first + stage] for first in range(0, _LAYERS, stage))


def _chunk(model: Model, layout: Layout, config: TransformerConfig, stage: int) -> torch.nn.Module:
    if model.family == "mae":
        return mae.build(model, config)
    vp_stage = stage if layout.vpp > 1 else None
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_sequence_length": SEQUENCE,
        "pre_process": parallel_state.is_pipeline_first_stage(False, vp_stage),
        "post_process": parallel_state.is_pipeline_last_stage(False, vp_stage),
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "vp_stage": vp_stage,
    }
    if model.family == "hybrid":
        stack = with_moa(_stack(model, config), model.moa)
        return HybridModel(config, stack, hybrid_layer_pattern=_pattern(model, layout), **common)
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=model.engine, normalization="RMSNorm", vp_stage=vp_stage
    )
    if config.mtp_num_layers is not None:
        mtp = get_gpt_mtp_block_spec(config, block, model.engine, vp_stage=vp_stage)
        common["mtp_block_spec"] = None if mtp is None else with_moa(mtp, model.moa)
    # A stage may have no decoder layer, where a layout gives the loss one of its own.
    spec = with_moa(block, model.moa) if block.layer_specs else block
    return GPTModel(config, spec, **common)


def _stack(model: Model, config: TransformerConfig) -> Any:
    if not model.engine:
        return local_hybrid_stack_spec()
    from moa_megatron.models import engine_hybrid_stack_spec

    return engine_hybrid_stack_spec(config)  # type: ignore[arg-type]


def build(model: Model, layout: Layout) -> list[DistributedDataParallel]:
    """The model chunks of this rank, each wrapped for data parallelism."""
    config = transformer_config(model, layout)
    config.finalize_model_grads_func = finalize_model_grads
    chunks = [_chunk(model, layout, config, stage) for stage in range(layout.vpp)]
    if model.optimizer == "muon" and model.moa.gated:
        muon.split_fc1(chunks)
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=layout.sharded_optimizer,
        delay_wgrad_compute=config.delay_wgrad_compute,
    )
    return [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def optimizer(
    model: Model, layout: Layout, chunks: list[DistributedDataParallel]
) -> MegatronOptimizer:
    """SGD, an Adam whose large epsilon keeps it from turning rounding errors into steps, Muon."""
    config = OptimizerConfig(
        optimizer=model.optimizer,
        lr=0.1 if model.optimizer == "sgd" else 0.01,
        muon_nesterov=True,
        muon_tp_mode="duplicated",
        muon_extra_scale_factor=0.2,
        muon_fp32_matmul_prec="highest",
        adam_eps=1e-2,
        weight_decay=0.01,
        clip_grad=1.0,
        use_distributed_optimizer=layout.sharded_optimizer,
    )
    overrides = get_standard_config_overrides(config)
    return get_megatron_optimizer(config, chunks, overrides, use_gloo_process_groups=False)


def gates(chunks: list[DistributedDataParallel]) -> list[MoAGate | MoAGroupedGate]:
    """All gates of this rank."""
    kinds = (MoAGate, MoAGroupedGate)
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, kinds)]
