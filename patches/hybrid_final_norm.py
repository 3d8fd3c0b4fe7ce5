"""HybridStack names Transformer Engine's norm for its last norm, whatever its specification."""

from typing import Any

from moa_megatron.patches._registry import Patch


def _applicable() -> bool:
    from megatron.core.extensions import transformer_engine

    return not transformer_engine.HAVE_TE


def _make(original: Any) -> Any:
    from megatron.core.transformer import torch_norm

    return torch_norm.WrappedTorchNorm


PATCH = Patch(
    name="hybrid_final_norm",
    defect="HybridModel cannot be built without Transformer Engine, even from local_specs",
    versions=">=0.19,<0.20",
    replace={"megatron.core.models.hybrid.hybrid_block:TENorm": _make},
    pins={"megatron.core.models.hybrid.hybrid_block:HybridStack.__init__": "8f31e2dfaa3491fa"},
    applicable=_applicable,
)
