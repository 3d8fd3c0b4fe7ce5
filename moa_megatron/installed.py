"""What stands beside Megatron and can run here: Transformer Engine, and products of the GPU.

Needs Megatron (and host mode, where there is no CUDA) to be importable already.
"""

from __future__ import annotations

import torch

from moa_megatron import host, packages

_LOCAL = "or use --transformer-impl local"


def transformer_engine_problem() -> str | None:
    """Why Transformer Engine's modules cannot run here, with the cure; None where they can."""
    if host.active() or not torch.cuda.is_available():
        return f"it needs a CUDA device and this machine has none: start it on a GPU, {_LOCAL}"
    if not packages.importable("transformer_engine"):
        return f"it is not installed: {packages.TE_INSTALL}, {_LOCAL}"
    version = packages.version("transformer-engine") or _own_version()
    problem = packages.engine_version_problem(version)
    if problem is not None:
        return f"{problem}, {_LOCAL}"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a wrong torch or CUDA shows as OSError or RuntimeError as well
        return f"version {version} does not import ({error}): build it for this torch, {_LOCAL}"
    return None


def has_grouped_product(bf16: bool) -> bool:
    """Whether torch multiplies experts of a bfloat16 model in one kernel on this machine's GPU."""
    if host.active() or not torch.cuda.is_available() or not bf16:
        return False
    return torch.cuda.get_device_capability()[0] >= 9


def fp8_recipes() -> list[str]:
    """Values of ``--fp8-recipe`` that keep no history and run here, finest scales first.

    Where Transformer Engine cannot run, those of Hopper: a dry run may stand for another machine.
    """
    if transformer_engine_problem() is not None:
        return ["blockwise", "tensorwise"]
    from megatron.core.extensions.transformer_engine import FP8GlobalStateManager as manager

    # Each answers with a reason, too.
    have = {
        "mxfp8": manager.is_mxfp8_available()[0],
        "blockwise": manager.is_fp8_block_scaling_available()[0],
    }
    return [name for name in have if have[name]] + ["tensorwise"]


def _own_version() -> str:
    """Built without pip, it leaves no metadata."""
    import transformer_engine

    return str(getattr(transformer_engine, "__version__", "0"))
