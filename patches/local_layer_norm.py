"""Asking LocalSpecProvider for an RMSNorm changes what it answers for LayerNorm from then on."""

import functools
from collections.abc import Callable
from typing import Any

from moa_megatron.patches._registry import Patch

_LAYER_NORM = "megatron.core.models.backends:LocalSpecProvider.layer_norm"


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.core.models import backends

    @functools.wraps(original)
    def layer_norm(
        self: Any, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Any:
        return backends.WrappedTorchNorm if rms_norm else backends.LNImpl

    return layer_norm


PATCH = Patch(
    name="local_layer_norm",
    defect="with Apex, one RMSNorm specification turns later LayerNorms into torch's",
    versions=">=0.19,<0.20",
    replace={_LAYER_NORM: _make},
    pins={_LAYER_NORM: "02d02e117018265c"},
)
