"""A HybridStack specification without Transformer Engine, for hosts and for plain GPUs."""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

__all__ = ["local_hybrid_stack_spec"]

# Transformer Engine fuses these two norms into the linear layer behind them and saves them under
# its name. MoE layers keep their norm apart, there and here.
_ATTENTION_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_MLP_KEYS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def _norm(backend: LocalSpecProvider) -> LayerNormBuilder:
    # The builder that reads config.normalization: it makes LayerNorm as well as RMSNorm.
    return backend.layer_norm(rms_norm=True)


def _attention_layer(backend: LocalSpecProvider) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=_norm(backend),
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(_ATTENTION_KEYS),
        ),
    )


def _mlp_layer(backend: LocalSpecProvider) -> ModuleSpec:
    mlp = partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(
            linear_fc1=backend.column_parallel_linear(),
            linear_fc2=backend.row_parallel_linear(),
            activation_func=backend.activation_func(),
        ),
    )
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=_norm(backend),
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(_MLP_KEYS),
        ),
    )


def _moe_layer(backend: LocalSpecProvider) -> ModuleSpec:
    # Any positive number of experts selects the MoE module; the config's number counts.
    moe = get_moe_module_spec(use_te=False, num_experts=1, moe_grouped_gemm=False)
    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=_norm(backend), mlp=moe, mlp_bda=get_bias_dropout_add
        ),
    )


def _mtp_block(backend: LocalSpecProvider) -> ModuleSpec:
    norm = _norm(backend)
    layer = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=norm,
            hnorm=norm,
            eh_proj=backend.column_parallel_linear(),
            # None: the inner layers follow from the pattern and this stack's own submodules.
            mtp_model_layer=None,
            layer_norm=norm,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer]),
    )


def local_hybrid_stack_spec() -> ModuleSpec:
    """Attention, MLP and MoE layers of HybridModel on Megatron's own linear layers.

    Upstream's only stack specification is Transformer Engine's. Checkpoints are interchangeable
    with it. Without Transformer Engine the patch `hybrid_final_norm` must be applied.
    """
    backend = LocalSpecProvider()
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=_attention_layer(backend),
            mlp_layer=_mlp_layer(backend),
            moe_layer=_moe_layer(backend),
            mtp_block_spec=_mtp_block(backend),
        ),
    )
