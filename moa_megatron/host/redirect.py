"""Sends what is asked of the CUDA device to the CPU, at torch's own entry points.

Wrapping the factories costs nothing per operation, unlike a TorchFunctionMode, which sits in every
dispatch and is local to a thread. Only calls that name a device pay one dictionary lookup.
"""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from moa_megatron.host import collectives

_FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "as_tensor",
    "asarray",
    "scalar_tensor",
    "rand",
    "randn",
    "randint",
    "randperm",
    "normal",
    "arange",
    "linspace",
    "logspace",
    "eye",
    "tril_indices",
    "triu_indices",
    "empty_strided",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "randint_like",
)
_NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")
_MEMORY_COUNTERS = (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "device_memory_used",
)
_NOTHING = (
    "init",
    "set_device",
    "synchronize",
    "empty_cache",
    "ipc_collect",
    "check_error",
    "set_stream",
    "reset_peak_memory_stats",
    "reset_max_memory_allocated",
)


def host_device(device: Any) -> Any:
    """The device to use instead: the CPU for every spelling of CUDA, all others unchanged."""
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    if isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda")):
        return torch.device("cpu")
    return device


def _on_host(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def host_factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = host_device(kwargs["device"])
        # Pinning needs a CUDA driver.
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return host_factory


_tensor_to = torch.Tensor.to
_tensor_type = torch.Tensor.type


@functools.wraps(_tensor_to)
def _to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args:
        args = (host_device(args[0]), *args[1:])
    if "device" in kwargs:
        kwargs["device"] = host_device(kwargs["device"])
    return _tensor_to(self, *args, **kwargs)


@functools.wraps(_tensor_type)
def _type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Megatron recognises its parameters by strings such as 'torch.cuda.FloatTensor'."""
    if dtype is None:
        # A subclass is sent here a second time, by the name of the method.
        name = _tensor_type(self).removeprefix("torch.").removeprefix("cuda.")
        return f"torch.cuda.{name}"
    if isinstance(dtype, str):
        dtype = dtype.replace("torch.cuda.", "torch.")
    return _tensor_type(self, dtype, *args, **kwargs)


# Dynamo keys its rules by function object, so each name that is rebound needs one of its own.
def _answers(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _itself() -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self


def _no_context() -> Callable[..., Any]:
    return lambda *args, **kwargs: contextlib.nullcontext()


class HostStream:
    """A CUDA stream where everything is synchronous."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: "HostEvent | None" = None) -> "HostEvent":
        event = event or HostEvent()
        event.record()
        return event

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def __enter__(self) -> "HostStream":
        return self

    def __exit__(self, *error: object) -> None: ...


class HostEvent:
    """A CUDA event; it remembers when it was recorded, so that elapsed times are real."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._at = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "HostEvent") -> float:
        return (end._at - self._at) * 1e3


_STREAM = HostStream()


def _seeder() -> Callable[[int], None]:
    def seed(seed: int) -> None:
        # Not torch.manual_seed, which calls torch.cuda.manual_seed_all and so this function.
        torch.default_generator.manual_seed(int(seed))

    return seed


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


def _cuda_functions() -> dict[str, Any]:
    """torch.cuda's entry points on a machine whose only generator is the CPU's."""
    # From major version 10 on Megatron asks for no CUDA_DEVICE_MAX_CONNECTIONS, which orders the
    # launches of older devices and has no meaning here.
    properties = SimpleNamespace(
        name="host CPU", major=10, minor=0, total_memory=0, multi_processor_count=1
    )
    profiler = SimpleNamespace(cudaProfilerStart=_answers(0), cudaProfilerStop=_answers(0))
    return {
        # An int, as on a GPU: the factories send every index to the CPU.
        "current_device": _answers(0),
        "current_stream": _answers(_STREAM),
        "default_stream": _answers(_STREAM),
        "stream": _no_context(),
        "device": _no_context(),
        "Stream": HostStream,
        "ExternalStream": type("HostExternalStream", (HostStream,), {}),
        "Event": HostEvent,
        "is_current_stream_capturing": _answers(False),
        "get_device_properties": _answers(properties),
        "get_device_capability": _answers((properties.major, properties.minor)),
        "get_device_name": _answers(properties.name),
        "memory_stats": lambda device=None: defaultdict(int),
        "mem_get_info": _answers((0, 0)),
        "cudart": _answers(profiler),
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": _seeder(),
        "manual_seed_all": _seeder(),
        **{name: _answers(0) for name in _MEMORY_COUNTERS},
        **{name: _answers(None) for name in _NOTHING},
    }


def install() -> None:
    """Rebind torch's entry points; host.install() decides whether and calls it once."""
    for name in _FACTORIES:
        setattr(torch, name, _on_host(getattr(torch, name)))
    for name in _NEW:
        setattr(torch.Tensor, name, _on_host(getattr(torch.Tensor, name)))
    methods = {
        "to": _to,
        "type": _type,
        "cuda": _itself(),
        "pin_memory": _itself(),
        "record_stream": _answers(None),
    }
    for name, method in methods.items():
        setattr(torch.Tensor, name, method)
    torch.nn.Module.cuda = _itself()  # type: ignore[method-assign]
    for name, function in _cuda_functions().items():
        setattr(torch.cuda, name, function)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _answers(None))
    torch.cuda.nvtx.range = _no_context()
    collectives.install()
