"""What exchanging an FFN changes in the layer around it: the norm in front, and its saved name.

Gates read the normalised FFN input. Transformer Engine's dense layers compute it inside fc1 and do
not hand it out, so these layers get a norm of their own; MoE layers have one already.

Checkpoints call the norm of a dense layer ``mlp.linear_fc1.layer_norm_weight``, as Transformer
Engine's fused fc1 does, whatever modules the layer has, and the norm of a MoE layer
``pre_mlp_layernorm.weight``. Megatron's local GPT layers use the dense name for both.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

NORM_KEY, DENSE_NAME = "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"


def prepare(
    layer: TransformerLayerSubmodules, moe_norm_has_dense_name: bool = False
) -> TransformerLayerSubmodules:
    """The layer with its norm apart from fc1 and saved under the common name; FFN still upstream's.

    Args:
        layer: submodules of a layer; returned as they are where nothing has to change.
        moe_norm_has_dense_name: save the norms of MoE layers as Megatron's local GPT layers do.

    Raises:
        ValueError: for an fc1 that holds a norm which cannot be taken out.
    """
    if isinstance(layer.mlp, partial) and layer.mlp.func is MoELayer:
        keys = dict(layer.sharded_state_dict_keys_map)
        keys.pop(NORM_KEY, None)
        if moe_norm_has_dense_name:
            keys[NORM_KEY] = DENSE_NAME
        if keys == layer.sharded_state_dict_keys_map:
            return layer
        return dataclasses.replace(layer, sharded_state_dict_keys_map=keys)
    submodules = dense_submodules(layer.mlp)
    if submodules is None or not holds_norm(submodules.linear_fc1):
        return layer
    return _unfuse(layer, submodules)


def dense_submodules(mlp: Any) -> MLPSubmodules | None:
    """The submodules of a dense ``MLP`` in a specification; None for any other node."""
    if isinstance(mlp, ModuleSpec) and mlp.module is MLP:
        return mlp.submodules  # type: ignore[no-any-return]
    if isinstance(mlp, partial) and getattr(mlp.func, "__self__", None) is MLP:
        return mlp.keywords.get("submodules")
    return None


def holds_norm(linear: Any) -> bool:
    """Whether a linear class of a specification normalises its input itself."""
    while isinstance(linear, partial):
        linear = linear.func
    return isinstance(linear, type) and any("LayerNorm" in base.__name__ for base in linear.__mro__)


def refuse_norm_in_fc1(kind: str) -> ValueError:
    """The error for an fc1 whose norm would stay between the input and the gates."""
    return ValueError(
        f"fc1 is {kind}, which normalises the FFN input where gates cannot see it; pass the "
        "specification of a whole layer, whose norm with_moa can take out of Transformer Engine's "
        "TELayerNormColumnParallelLinear, or build it on plain linear layers"
    )


def _unfuse(
    layer: TransformerLayerSubmodules, submodules: MLPSubmodules
) -> TransformerLayerSubmodules:
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    fc1: Any = submodules.linear_fc1
    if fc1 is not TELayerNormColumnParallelLinear or layer.pre_mlp_layernorm is not IdentityOp:
        raise refuse_norm_in_fc1(getattr(fc1, "__name__", str(fc1)))
    backend = TESpecProvider()
    plain = dataclasses.replace(submodules, linear_fc1=backend.column_parallel_linear())
    old: Any = layer.mlp
    mlp: Any
    if isinstance(old, partial):
        mlp = partial(old.func, *old.args, **{**old.keywords, "submodules": plain})
    else:
        mlp = ModuleSpec(old.module, old.params, plain, old.metainfo)
    return dataclasses.replace(
        layer,
        pre_mlp_layernorm=partial(stateless_norm, backend),
        mlp=mlp,
        sharded_state_dict_keys_map={**layer.sharded_state_dict_keys_map, NORM_KEY: DENSE_NAME},
    )


def stateless_norm(
    backend: BackendSpecProvider, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
) -> Any:
    """The backend's norm before a residual branch, without an entry for quantisation state.

    A fused fc1 has no such entry for its norm, so checkpoints must not hold or ask for one.
    """
    build: Any = backend.layer_norm(has_residual=True)
    norm: nn.Module = build(config=config, hidden_size=hidden_size, eps=eps)
    _forget_state(norm)
    return norm


def forget_norm_states(chunks: list[nn.Module]) -> list[nn.Module]:
    """Takes the quantisation state of all Transformer Engine norms out of checkpoints.

    Local norms have none, and loading stops at a missing one, so a model trained on a host could
    not continue on a GPU. Nothing is lost: a norm quantises nothing
    (``transformer_engine.pytorch.ops.BasicOperation.get_extra_state``).
    A hook for ``megatron.training.models.ModelConfig.pre_wrap_hooks``.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        from transformer_engine.pytorch import LayerNorm, RMSNorm

        for module in (module for chunk in chunks for module in chunk.modules()):
            if isinstance(module, LayerNorm | RMSNorm):
                _forget_state(module)
    return chunks


def recompute_no_empty_mlps(chunks: list[nn.Module]) -> list[nn.Module]:
    """Takes attention layers of HybridModel, which have no FFN, out of ``--recompute-modules mlp``.

    In FP8 Megatron hands their ``IdentityOp`` to Transformer Engine, which ends in a ValueError
    about ``padding_mask`` (``megatron.core.transformer.TransformerLayer._forward_mlp``).
    A hook for ``megatron.training.models.ModelConfig.pre_wrap_hooks``.
    """
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, TransformerLayer) and isinstance(module.mlp, IdentityOp):
            module.recompute_mlp = False
    return chunks


def _forget_state(norm: nn.Module) -> None:
    norm.register_state_dict_post_hook(_without_state)
    norm.register_load_state_dict_pre_hook(_with_state)


def _without_state(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state.pop(f"{prefix}_extra_state", None)


def _with_state(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    # The module would report its entry missing; it takes None for an empty one.
    state.setdefault(f"{prefix}_extra_state", None)
