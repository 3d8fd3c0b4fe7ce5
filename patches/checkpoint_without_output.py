"""CheckpointWithoutOutput takes every caller for an fp8 one and so needs Transformer Engine."""

import functools
from collections.abc import Callable
from typing import Any

from moa_megatron.patches._registry import Patch

_INIT = "megatron.core.tensor_parallel.random:CheckpointWithoutOutput.__init__"


def _applicable() -> bool:
    # With Transformer Engine its handling of fp8 is harmless in other precisions, and callers
    # which leave `fp8` at its default rely on it in fp8.
    from megatron.core.tensor_parallel import random

    return not random.HAVE_TE


def _make(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, fp8: Any = False) -> None:
        original(self, fp8)
        self.fp8 = bool(fp8)

    return init


PATCH = Patch(
    name="checkpoint_without_output",
    defect="--recompute-modules layernorm and moe_act end in a NameError",
    versions=">=0.19,<0.20",
    replace={_INIT: _make},
    pins={_INIT: "72036565b77136f2"},
    applicable=_applicable,
)
