"""Where Apex is, its LayerNorm stands for RMSNorm, too, which it refuses; or for no norm any more.

Local modules take the last norm of GPTModel and those of multi-token prediction from globals of
three modules, which are then Apex's, whatever the model's norm. And asking LocalSpecProvider for an
RMSNorm rebinds its global to torch's, for LayerNorm as well.
"""

import functools
from collections.abc import Callable
from typing import Any

from moa_megatron.patches._registry import Patch

_CHOICE = "megatron.core.models.backends:LocalSpecProvider.layer_norm"
_GPT = "megatron.core.models.gpt.gpt_layer_specs"
_BLOCK = "megatron.core.transformer.transformer_block"


def _make_choice(original: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.core.models import backends

    @functools.wraps(original)
    def layer_norm(
        self: Any, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Any:
        return backends.WrappedTorchNorm if rms_norm else backends.LNImpl

    return layer_norm


def _make_norm(original: Any) -> Any:
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
    from megatron.core.transformer import torch_norm

    if original is not FusedLayerNorm:
        return original

    class ApexOrTorchNorm:
        """Apex's for LayerNorm, torch's for all others; a class, as specifications want it."""

        def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **words: Any) -> Any:
            fused = config.normalization == "LayerNorm"
            build: Any = FusedLayerNorm if fused else torch_norm.WrappedTorchNorm
            return build(config=config, hidden_size=hidden_size, eps=eps, **words)

    return ApexOrTorchNorm


PATCH = Patch(
    name="apex_layer_norm",
    defect="with Apex, GPTModel with RMSNorm cannot be built from local modules",
    versions=">=0.19,<0.20",
    replace={
        _CHOICE: _make_choice,
        "megatron.core.models.backends:LNImpl": _make_norm,
        f"{_GPT}:LNImpl": _make_norm,
        f"{_BLOCK}:LayerNormImpl": _make_norm,
    },
    pins={
        _CHOICE: "02d02e117018265c",
        f"{_GPT}:get_gpt_decoder_block_spec": "dcec23af22cbe954",
        f"{_BLOCK}:_get_block_submodules": "731f32c0e00a3775",
        "megatron.core.fusions.fused_layer_norm:FusedLayerNorm.__init__": "e169058a9d416e53",
    },
)
