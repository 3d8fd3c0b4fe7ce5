"""The wheel has the compiled dataset helpers, but no Makefile with which to compile them."""

import functools
import importlib.util
from collections.abc import Callable

from moa_megatron.patches._registry import Patch


def _make(original: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(original)
    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers


PATCH = Patch(
    name="compile_helpers",
    defect="every training run exits with status 1 while it compiles the dataset helpers",
    versions=">=0.19,<0.20",
    replace={"megatron.core.datasets.utils:compile_helpers": _make},
    pins={"megatron.core.datasets.utils:compile_helpers": "84029a50ae8cfac1"},
)
