"""Pipeline stages disagree on the size of HybridModel's MoE metrics."""

import functools
from collections.abc import Callable
from typing import Any

from moa_megatron.patches._registry import Patch

_TRACKER = "megatron.core.transformer.moe.moe_logging:MoEMetricsTracker"


def _recorded_layers(mtp_num_layers: int | None) -> int | None:
    """How many layers a router of this run counts; None outside a training run of HybridModel."""
    from megatron.training import global_vars

    args = global_vars._GLOBAL_ARGS
    if args is None or getattr(args, "hybrid_layer_pattern", None) is None:
        return None
    return args.num_layers + (mtp_num_layers or 0)


def _make(original: Callable[..., str]) -> Callable[..., str]:
    """A stage without MoE layers creates its metrics here: sized by the number of MoE layers,
    which is right for the average, while the routers of other stages count all layers."""

    @functools.wraps(original)
    def report(self: Any, *args: Any, **kwargs: Any) -> str:
        if kwargs.get("force_initialize"):
            layers = _recorded_layers(kwargs.get("mtp_num_layers"))
            names = self._resolve_names(kwargs.get("track_names"))
            for name in names if layers is not None else ():
                self.ensure_initialized(name, layers)
        return original(self, *args, **kwargs)

    return report


PATCH = Patch(
    name="hybrid_moe_metrics",
    defect="HybridModel with a pipeline stage without MoE layers aborts or hangs at the first log",
    versions=">=0.19,<0.20",
    replace={f"{_TRACKER}.report": _make},
    pins={
        f"{_TRACKER}.report": "31e50d1660362909",
        f"{_TRACKER}.ensure_initialized": "2a5eaead424ab05a",
        f"{_TRACKER}.record": "f14cfa4dd21e1b6d",
        "megatron.training.training:training_log": "5e34a182d566e325",
    },
)
