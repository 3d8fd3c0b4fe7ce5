"""Repairs of defects in the supported Megatron version, each with a test that fails without it.

`apply()` puts every applicable one in place: in host mode after `host.install()`, else before the
model is built. README.md lists them, with the condition under which each can be dropped.
"""

from collections.abc import Iterable

from moa_megatron.patches import (
    _registry,
    apex_layer_norm,
    checkpoint_without_output,
    compile_helpers,
    distributed_optimizer,
    hybrid_final_norm,
    hybrid_moe_metrics,
    throughput,
)
from moa_megatron.patches._registry import Patch

__all__ = ["PATCHES", "Patch", "apply", "undo"]

PATCHES: dict[str, Patch] = {
    module.PATCH.name: module.PATCH
    for module in (
        compile_helpers,
        distributed_optimizer,
        checkpoint_without_output,
        hybrid_moe_metrics,
        hybrid_final_norm,
        apex_layer_norm,
        throughput,
    )
}


def _chosen(names: Iterable[str] | None) -> list[Patch]:
    chosen = list(PATCHES) if names is None else list(names)
    unknown = [name for name in chosen if name not in PATCHES]
    if unknown:
        raise ValueError(
            f"names={unknown}: no such upstream patch; choose among {', '.join(PATCHES)}"
        )
    return [PATCHES[name] for name in chosen]


def apply(names: Iterable[str] | None = None) -> list[str]:
    """Apply the named patches, by default all; the names of those in place afterwards.

    A patch whose upstream source is not the one it was written against is left out with a warning:
    every defect here shows by itself, so a wrong repair is worse than none.
    """
    return [patch.name for patch in _chosen(names) if _registry.put(patch)]


def undo(names: Iterable[str] | None = None) -> list[str]:
    """Restore the originals of the named patches, by default all; the names of those restored."""
    return [patch.name for patch in reversed(_chosen(names)) if _registry.take(patch)]
