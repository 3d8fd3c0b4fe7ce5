"""Megatron's model configuration and builder of the masked autoencoder, with MoA in place."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.vision.vit_layer_specs import (
    get_vit_layer_with_local_spec,
    get_vit_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import LayerNormImpl, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.models.base import ModelBuilder, ModelConfig, compose_hooks
from megatron.training.models.dist_utils import unimodal_build_distributed_models

from moa_megatron.config import MoAConfig
from moa_megatron.layers import DENSE_NAME, NORM_KEY
from moa_megatron.specs import with_moa
from moa_megatron.vision.model import ImageShape, MAEModel

# Transformer Engine saves these norms under the name of the linear layer that it fuses them with.
_LOCAL_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    NORM_KEY: DENSE_NAME,
}


@dataclass(kw_only=True)
class MAEModelConfig(ModelConfig):
    """What ``MAEModelBuilder`` builds.

    Args:
        transformer: configuration of the encoder.
        decoder: configuration of the decoder.
        layer_spec: one layer of either, MoA in place.
        image: sizes of the images.
    """

    builder: ClassVar[str] = "moa_megatron.vision.building.MAEModelBuilder"
    transformer: TransformerConfig
    decoder: TransformerConfig
    layer_spec: ModuleSpec
    image: ImageShape

    def __getattr__(self, name: str) -> Any:
        """Megatron's training loop reads fields of the transformer on the model's configuration."""
        if name in ("transformer", "__setstate__"):
            raise AttributeError(name)
        return getattr(self.transformer, name)


class MAEModelBuilder(ModelBuilder[MAEModel, MAEModelConfig]):
    """Builds the whole model on every rank; there are no pipeline stages."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MAEModel:
        """One model; the stages' arguments are the base class's and not used."""
        config: Any = self._model_config
        return build_model(config, pg_collection)

    def build_distributed_models(
        self,
        pg_collection: ProcessGroupCollection,
        ddp_config: DistributedDataParallelConfig | None = None,
        overlap_param_gather_with_optimizer_step: bool = False,
        use_megatron_fsdp: bool = False,
        use_torch_fsdp2: bool = False,
        wrap_with_ddp: bool = True,
        data_parallel_random_init: bool = False,
        mixed_precision_wrapper: Any = Float16Module,
        model_type: ModelType = ModelType.encoder_or_decoder,
    ) -> list[MAEModel]:
        """As upstream's builders of language models do it."""
        config: Any = self._model_config
        return unimodal_build_distributed_models(  # type: ignore[no-any-return]
            self.build_model,
            config.transformer,
            pg_collection,
            ddp_config,
            overlap_param_gather_with_optimizer_step,
            use_megatron_fsdp,
            use_torch_fsdp2,
            wrap_with_ddp,
            data_parallel_random_init,
            mixed_precision_wrapper,
            compose_hooks(config.pre_wrap_hooks),
            model_type,
        )


def build_model(
    config: MAEModelConfig, pg_collection: ProcessGroupCollection | None = None
) -> MAEModel:
    """The model of a configuration, unwrapped."""
    encoder, decoder = config.transformer, config.decoder
    return MAEModel(
        encoder,
        decoder,
        _block(config.layer_spec, encoder.num_layers),
        _block(config.layer_spec, decoder.num_layers),
        config.image,
        pg_collection,
    )


def model_config(args: argparse.Namespace, moa: MoAConfig) -> MAEModelConfig:
    """What ``megatron.training.pretrain`` builds the masked autoencoder from."""
    return MAEModelConfig(
        transformer=core_transformer_config_from_args(args),
        decoder=core_transformer_config_from_args(decoder_args(args)),
        layer_spec=with_moa(layer_spec(args.transformer_impl == "local"), moa),
        image=image_shape(args),
    )


def image_shape(args: argparse.Namespace) -> ImageShape:
    """Sizes of the images in Megatron's arguments."""
    return ImageShape(args.img_h, args.img_w, args.patch_dim, args.num_channels)


def decoder_args(args: argparse.Namespace) -> argparse.Namespace:
    """The namespace as the decoder's transformer has it."""
    decoder = copy.copy(args)
    decoder.num_layers = args.mae_decoder_layers
    decoder.hidden_size = args.mae_decoder_width
    decoder.num_attention_heads = args.mae_decoder_heads
    decoder.kv_channels = args.mae_decoder_width // args.mae_decoder_heads
    decoder.ffn_hidden_size = args.mae_decoder_ffn
    return decoder


def layer_spec(local: bool) -> ModuleSpec:
    """Upstream's layer of a vision transformer, with attention in both directions.

    Args:
        local: Megatron's own linear layers instead of Transformer Engine's. Upstream leaves their
            norms under names of their own; here both kinds save them alike.
    """
    if not local:
        return get_vit_layer_with_transformer_engine_spec()
    spec = get_vit_layer_with_local_spec()
    backend = LocalSpecProvider()
    norm = backend.layer_norm(rms_norm=True)  # the builder that reads config.normalization
    submodules = dataclasses.replace(
        spec.submodules,
        input_layernorm=norm,
        pre_mlp_layernorm=norm,
        sharded_state_dict_keys_map=dict(_LOCAL_KEYS),
    )
    return ModuleSpec(spec.module, spec.params, submodules, spec.metainfo)


def _block(layer: ModuleSpec, layers: int) -> TransformerBlockSubmodules:
    """A block of equal layers and a last norm, by the same modules as the layers' own."""
    own = layer.submodules.input_layernorm
    # Transformer Engine's layers have theirs within the next linear layer.
    norm = LayerNormImpl if own is IdentityOp else own
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
