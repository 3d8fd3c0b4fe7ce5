"""Mixture of Activations feedforward layers for Megatron-core.

The public names load on first use, so that importing the package costs nothing and host mode can
be installed before Megatron is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moa_megatron.config import MoAConfig
    from moa_megatron.op import mixture
    from moa_megatron.specs import with_moa

__all__ = ["MoAConfig", "mixture", "with_moa"]

_HOME = {"MoAConfig": "config", "mixture": "op", "with_moa": "specs"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
