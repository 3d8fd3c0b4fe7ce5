"""Megatron's model configurations with the MoA specification in place."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.models.gpt import (
    GPTModelBuilder,
    GPTModelConfig,
    default_layer_spec,
    mtp_block_spec,
)
from megatron.training.models.hybrid import HybridModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from moa_megatron import muon
from moa_megatron.checkpoints import moe_norm_has_dense_name
from moa_megatron.config import MoAConfig
from moa_megatron.layers import forget_norm_states, recompute_no_empty_mlps
from moa_megatron.local_specs import local_hybrid_stack_spec
from moa_megatron.specs import with_moa


@dataclass(kw_only=True)
class MoAGPTModelConfig(GPTModelConfig):
    """GPTModel whose builder also exchanges the FFNs of multi-token prediction."""

    builder: ClassVar[str] = "moa_megatron.models.MoAGPTModelBuilder"
    moa: MoAConfig | None = None
    moe_norm_has_dense_name: bool = False


class MoAGPTModelBuilder(GPTModelBuilder):
    """Upstream's builder makes the MTP layers from its own specs, whatever spec it is given."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """One pipeline stage; as upstream's, with ``with_moa`` on decoder and MTP specs."""
        config: Any = self._model_config
        spec = self._layer_spec(vp_stage)
        mtp_spec = mtp_block_spec(config, spec, vp_stage=vp_stage)
        exchange = partial(
            with_moa, config=config.moa, moe_norm_has_dense_name=config.moe_norm_has_dense_name
        )
        vp_size = config.virtual_pipeline_model_parallel_size
        if pre_process is None:
            first_chunk = is_vp_first_stage(vp_stage=vp_stage, vp_size=vp_size)
            pre_process = first_chunk and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            last_chunk = is_vp_last_stage(vp_stage=vp_stage, vp_size=vp_size)
            post_process = last_chunk and is_pp_last_stage(pg_collection.pp)
        return GPTModel(
            config=config.transformer,
            transformer_layer_spec=exchange(spec),
            mtp_block_spec=None if mtp_spec is None else exchange(mtp_spec),
            vocab_size=_padded_vocab(config),
            max_sequence_length=config.seq_length,
            fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
            parallel_output=config.parallel_output,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            rope_scaling=config.rope_scaling,
            rope_scaling_factor=config.rope_scaling_factor,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            scatter_embedding_sequence_parallel=config.scatter_embedding_sequence_parallel,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )

    def _layer_spec(self, vp_stage: int | None) -> Any:
        """The given specification, or what a given function returns, or upstream's default."""
        config: Any = self._model_config
        spec = config.transformer_layer_spec
        if spec is None:
            return default_layer_spec(config, vp_stage)
        if isinstance(spec, ModuleSpec) or not callable(spec):
            return spec
        staged = "vp_stage" in inspect.signature(spec).parameters
        return spec(config, vp_stage=vp_stage) if staged else spec(config)


def _padded_vocab(config: GPTModelConfig) -> int:
    assert config.vocab_size is not None
    if not config.should_pad_vocab:
        return config.vocab_size
    return int(
        calculate_padded_vocab_size(
            config.vocab_size,
            config.make_vocab_size_divisible_by,
            config.transformer.tensor_model_parallel_size,
        )
    )


def model_config(args: argparse.Namespace, moa: MoAConfig) -> Any:
    """What ``megatron.training.pretrain`` builds its model from."""
    config = _CONFIGS[args.moa_model](args, moa)
    if not args.moa_scaled_init:
        for part in (config.transformer, getattr(config, "decoder", config.transformer)):
            part.output_layer_init_method = part.init_method
    config.pre_wrap_hooks.append(recompute_no_empty_mlps)
    if moa.mixing != "fixed":
        config.pre_wrap_hooks.append(forget_norm_states)
    if muon.splits_fc1(args):
        config.pre_wrap_hooks.append(muon.split_fc1)
    return config


def _gpt_config(args: argparse.Namespace, moa: MoAConfig) -> GPTModelConfig:
    if moa.mixing == "fixed":
        return gpt_config_from_args(args)
    config = gpt_config_from_args(args, model_config_cls=MoAGPTModelConfig)
    config.moa = moa
    config.moe_norm_has_dense_name = moe_norm_has_dense_name(args)
    return config


def _hybrid_config(args: argparse.Namespace, moa: MoAConfig) -> HybridModelConfig:
    config = hybrid_config_from_args(args)
    base = config.hybrid_stack_spec
    if base is None:
        local = args.transformer_impl == "local"
        base = local_hybrid_stack_spec() if local else engine_hybrid_stack_spec(args)
    old_names = moa.mixing != "fixed" and moe_norm_has_dense_name(args)
    config.hybrid_stack_spec = with_moa(base, moa, old_names)
    return config


def engine_hybrid_stack_spec(args: argparse.Namespace) -> ModuleSpec:
    """Upstream's stack on Transformer Engine; it groups experts whatever ``moe_grouped_gemm`` says.

    Without that argument, the same stack with sequential experts.
    """
    if args.moe_grouped_gemm:
        return hybrid_stack_spec
    # Any positive number of experts selects the MoE module; the config's number counts.
    moe = get_moe_module_spec(use_te=True, num_experts=1, moe_grouped_gemm=False)
    stack = hybrid_stack_spec.submodules
    layer = stack.moe_layer
    submodules = dataclasses.replace(layer.submodules, mlp=moe)
    layer = ModuleSpec(layer.module, layer.params, submodules, layer.metainfo)
    stack = dataclasses.replace(stack, moe_layer=layer)
    whole = hybrid_stack_spec
    return ModuleSpec(whole.module, whole.params, stack, whole.metainfo)


def _mae_config(args: argparse.Namespace, moa: MoAConfig) -> Any:
    from moa_megatron.vision.building import model_config  # needs upstream's vision modules

    return model_config(args, moa)


_CONFIGS = {"gpt": _gpt_config, "hybrid": _hybrid_config, "mae": _mae_config}
