"""Weights of the Megatron model under the names and in the layout of the plain one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moa_megatron.vision.reference import MAEShape

_WHOLE_MODEL = {
    "patch_embedding.": "encoder.patch_embedding.",
    "class_token": "encoder.class_token",
    "mask_token": "decoder.mask_token",
    "encoder.final_layernorm.": "encoder.norm.",
    "decoder_embedding.": "decoder.embedding.",
    "decoder.final_layernorm.": "decoder.norm.",
    "head.": "decoder.head.",
}
_OF_A_LAYER = {
    "input_layernorm.": "norm1.",
    "self_attention.linear_qkv.layer_norm_": "norm1.",
    "self_attention.linear_qkv.": "attention.qkv.",
    "self_attention.linear_proj.": "attention.proj.",
    "pre_mlp_layernorm.": "norm2.",
    "mlp.linear_fc1.layer_norm_": "norm2.",
    "mlp.linear_fc1.": "ffn.w_in.",
    "mlp.linear_fc2.": "ffn.w_out.",
    "mlp.moa_gate.weight": "ffn.coefficients",
}


def from_megatron(state: Mapping[str, Tensor], shape: MAEShape) -> dict[str, Tensor]:
    """The state of ``MAE`` from that of ``moa_megatron.vision.model``, all ranks' parts joined.

    Norms may be saved under Transformer Engine's fused names. Megatron packs queries, keys and
    values head by head (``SelfAttention.get_query_key_value_tensors``).

    Raises:
        ValueError: naming every tensor that has no place in the plain model.
    """
    converted, unknown = {}, []
    for name, value in state.items():
        plain = _plain_name(name)
        if plain is None or plain in converted:
            unknown.append(name)
            continue
        if ".attention.qkv." in plain:
            heads = shape.heads if plain.startswith("encoder.") else shape.decoder_heads
            value = unpack_heads(value, heads)
        converted[plain] = value
    if unknown:
        raise ValueError(f"tensors without a place in the plain model: {', '.join(unknown)}")
    return converted


def unpack_heads(packed: Tensor, heads: int) -> Tensor:
    """Rows [q, k, v] of each head -> rows of all queries, of all keys, of all values.

    Args:
        packed: [heads * 3 * d/heads, d] of ``linear_qkv.weight``, or its bias, which lacks d.
    """
    rest = packed.shape[1:]
    return packed.reshape(heads, 3, -1, *rest).transpose(0, 1).reshape(packed.shape)


def _plain_name(name: str) -> str | None:
    stack, separator, rest = name.partition(".layers.")
    table, prefix = _WHOLE_MODEL, ""
    if separator and stack in ("encoder", "decoder"):
        index, _, name = rest.partition(".")
        table, prefix = _OF_A_LAYER, f"{stack}.blocks.{index}."
    for start, replacement in table.items():
        if name.startswith(start):
            return prefix + replacement + name.removeprefix(start)
    return None
