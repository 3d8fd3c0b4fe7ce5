"""Gives a few of Megatron's modules a host variant, at the moment each is imported.

Most of Megatron binds names with `from x import y`, so a later rebinding would have to find every
copy. Changing a module right after its own code has run reaches all of them.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

from moa_megatron.host import attention


def _rebind(module: ModuleType, name: str, value: Any) -> None:
    if not hasattr(module, name):
        raise RuntimeError(f"host mode: {module.__name__} has no {name} in this Megatron version")
    setattr(module, name, value)


@contextlib.contextmanager
def _replaced(owner: ModuleType, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _random(module: ModuleType) -> None:
    """One generator serves as the CPU's and the device's, so a fork always changes the former."""

    def get_state(
        device: Any = None, clone: bool = False, graph_safe: bool = False
    ) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    def share_storage(dst: torch.Tensor, src: torch.Tensor) -> None:
        # Below autograd like upstream's C++ extension, which needs a compiler at run time.
        source = src.untyped_storage()
        target = dst.untyped_storage()
        target.resize_(source.nbytes())
        target.copy_(source)

    _rebind(module, "_get_cuda_rng_state", get_state)
    _rebind(module, "_set_cuda_rng_state", set_state)
    _rebind(module, "_get_share_storage", lambda: share_storage)
    logging.getLogger(module.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _moe_utils(module: ModuleType) -> None:
    """Upstream converts to numpy only what it has first copied from a device."""
    upstream = module.maybe_move_tensor_to_cpu

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return upstream(tensor, as_numpy, record_stream)

    _rebind(module, "maybe_move_tensor_to_cpu", move)


def _counting_one_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def with_device(*args: Any, **kwargs: Any) -> Any:
        with _replaced(torch.cuda, "device_count", lambda: 1):
            return function(*args, **kwargs)

    return with_device


def _initialize(module: ModuleType) -> None:
    """Groups and generators are only set up where a device is counted; the warm-up of fused
    kernels would draw random numbers, by an amount that depends on the layout."""
    for name in ("_initialize_distributed", "_set_random_seed"):
        _rebind(module, name, _counting_one_device(getattr(module, name)))
    upstream = functools.partial(module.initialize_megatron, allow_no_cuda=True)
    _rebind(module, "initialize_megatron", functools.wraps(module.initialize_megatron)(upstream))
    _rebind(module, "set_jit_fusion_options", _nothing)


def _norm(module: ModuleType) -> None:
    _rebind(module, "WrappedTorchNorm", attention.HostNorm)


def _dot_product_attention(module: ModuleType) -> None:
    _rebind(module, "DotProductAttention", attention.host_attention(module.DotProductAttention))


def _hybrid_block(module: ModuleType) -> None:
    """HybridStack names Transformer Engine's norm for its last norm, whatever the spec says."""
    _rebind(module, "TENorm", attention.HostNorm)


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "megatron.core.tensor_parallel.random": _random,
    "megatron.core.transformer.moe.moe_utils": _moe_utils,
    "megatron.core.transformer.torch_norm": _norm,
    "megatron.core.transformer.dot_product_attention": _dot_product_attention,
    "megatron.core.models.hybrid.hybrid_block": _hybrid_block,
    "megatron.training.initialize": _initialize,
}


def _eager(function: Any = None, **options: Any) -> Any:
    """torch.compile for those who shall do without."""
    return function if function is not None else _eager


_EAGER_PACKAGES = ("megatron", "emerging_optimizers")


class _HostImports(MetaPathFinder):
    """Imports Megatron's modules with its functions left eager, and runs their hooks.

    Megatron and its optimizers compile small functions by decorators: on a host that costs more
    than it gains. Switching dynamo off would reach our own torch.compile as well.
    """

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in _EAGER_PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run_code = spec.loader.exec_module
        hook = HOOKS.get(fullname, _nothing)

        def exec_module(module: ModuleType) -> None:
            with _replaced(torch, "compile", _eager):
                run_code(module)
            hook(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Put the finder in front of the others; host.install() calls it once."""
    sys.meta_path.insert(0, _HostImports())
