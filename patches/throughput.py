"""Megatron's count of FLOPs, behind TFLOP/s and MFU, cannot know what MoA adds to a model."""

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from moa_megatron.patches._registry import Patch

_COUNT = "megatron.training.training:num_floating_point_operations"


def _missing(args: Namespace) -> float:
    """FLOPs of a token's training step that upstream leaves out; 0 for models built elsewhere."""
    from moa_megatron.config import moa_config_from_args
    from moa_megatron.costs.flops import missing_from_megatron

    if not hasattr(args, "moa_mixing"):
        return 0.0
    return missing_from_megatron(args, moa_config_from_args(args))


def _of_image(args: Namespace) -> float:
    """FLOPs of an image's training step: upstream counts language models only."""
    from moa_megatron.config import moa_config_from_args
    from moa_megatron.vision.costs import flops

    return flops(args, moa_config_from_args(args))


def _make(original: Callable[..., float]) -> Callable[..., float]:
    """Upstream has no hook: its two callers find the function among the module's globals."""

    @functools.wraps(original)
    def count(
        args: Any,
        batch_size: int,
        seqlen_squared_sum_in_batch: float | None = None,
        total_real_tokens_in_batch: float | None = None,
    ) -> float:
        if getattr(args, "moa_model", None) == "mae":
            return batch_size * _of_image(args)
        upstream = original(
            args, batch_size, seqlen_squared_sum_in_batch, total_real_tokens_in_batch
        )
        tokens = total_real_tokens_in_batch
        if tokens is None:
            tokens = batch_size * args.seq_length
        return upstream + tokens * _missing(args)

    return count


PATCH = Patch(
    name="throughput",
    defect="throughput and MFU leave out gates, mixtures, HybridModel's prediction projections and "
    "models of images",
    versions=">=0.19,<0.20",
    replace={_COUNT: _make},
    pins={_COUNT: "f9ed9b380e17ebd3"},
)
