"""Contenders timed in turn, their memory and their error: what --op and --layer share."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PASSES = ("forward", "backward", "both")
_WARM_UP = 2
_FLUSH_BYTES = 128 * 2**20  # more than the L2 cache of a GPU or a CPU's share of its last level
_HEAD_START = 4_000_000  # GPU cycles, about 2 ms: the host queues a pass while the GPU sleeps


class CheckFailed(Exception):
    """The op or layer is wrong: there is nothing to time. The message names tensor and bound."""


@dataclass
class Contender:
    """Something to time: a forward pass and, where there are inputs, its backward pass.

    Args:
        forward: returns a tensor or a tuple of tensors.
        inputs: tensors whose gradients the backward pass computes; empty: forward only.
        grad: gradient of what ``forward`` returns, in the same structure.
    """

    forward: Callable[[], Any]
    inputs: Sequence[Tensor] = ()
    grad: Any = None

    def backward(self, output: Any) -> tuple[Tensor, ...]:
        """Gradients of ``inputs``; frees what ``forward`` has saved."""
        return torch.autograd.grad(output, self.inputs, self.grad)


@dataclass
class Times:
    """Milliseconds per round; ``host`` is what a CUDA pass keeps the issuing thread busy."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    @property
    def both(self) -> list[float]:
        """Forward and backward of the same round."""
        return [a + b for a, b in zip(self.forward, self.backward)]

    def medians(self) -> dict[str, float]:
        """Medians of what was timed, as ``forward_ms`` and so on."""
        names = (*PASSES, "host")
        return {f"{n}_ms": statistics.median(getattr(self, n)) for n in names if getattr(self, n)}


class Clock:
    """Times one call in milliseconds.

    Its caches are overwritten before, so that no contender finds them warmer than another. CUDA:
    two events around it, the GPU held back until it is queued, so device time without launch gaps.
    CPU: wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        if self.cuda:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    @property
    def method(self) -> str:
        """How times are taken, for the report."""
        if self.cuda:
            return "CUDA events around each pass, device time, L2 flushed before it"
        return "wall clock around each pass, caches flushed before it"

    def time(self, call: Callable[[], Any]) -> tuple[Any, float, float]:
        """What ``call`` returns, its milliseconds, and those in which it kept the host busy."""
        self._flush.zero_()
        if not self.cuda:
            begin = time.perf_counter()
            result = call()
            elapsed = 1e3 * (time.perf_counter() - begin)
            return result, elapsed, elapsed
        torch.cuda._sleep(_HEAD_START)
        self._events[0].record()
        begin = time.perf_counter()
        result = call()
        host = 1e3 * (time.perf_counter() - begin)
        self._events[1].record()
        self._events[1].synchronize()
        return result, self._events[0].elapsed_time(self._events[1]), host


def race(contenders: dict[str, Contender], repeats: int, clock: Clock) -> dict[str, Times]:
    """Times all contenders in turn, A B C A B C, so that a drift of the machine meets each."""
    times = {name: Times() for name in contenders}
    for round_ in range(-_WARM_UP, repeats):
        for name, each in contenders.items():
            output, forward, host = clock.time(each.forward)
            backward = 0.0
            if each.inputs:
                grads, backward, more = clock.time(functools.partial(each.backward, output))
                host += more
                del grads
            del output
            if round_ < 0:
                continue
            times[name].forward.append(forward)
            if each.inputs:
                times[name].backward.append(backward)
            if clock.cuda:
                times[name].host.append(host)
    return times


def ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Median and range of the ratios of each round."""
    ratios = [one / two for one, two in zip(a, b, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def ratios(a: Times, b: Times) -> dict[str, dict[str, float]]:
    """``ratio`` for forward, backward, both."""
    return {name: ratio(getattr(a, name), getattr(b, name)) for name in PASSES}


def fastest(times: dict[str, Times], names: Iterable[str]) -> str:
    """The name with the smallest median of forward and backward together."""
    return min(names, key=lambda name: statistics.median(times[name].both))


def saved_bytes(contender: Contender) -> int:
    """Bytes of the distinct storages that the forward pass keeps for the backward pass."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        contender.forward()
    return sum(storages.values())


def peak_bytes(contender: Contender, device: torch.device) -> int | None:
    """Most bytes that forward and backward allocate on top of their inputs; None on the CPU."""
    if device.type != "cuda":
        return None
    contender.backward(contender.forward())  # builds and caches what the first call needs
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    contender.backward(contender.forward())
    return torch.cuda.max_memory_allocated(device) - before


def memory(contender: Contender, device: torch.device) -> dict[str, int | None]:
    """Both measures of memory, in bytes."""
    return {"saved_bytes": saved_bytes(contender), "peak_bytes": peak_bytes(contender, device)}


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| over all elements, in float64; NaN stays NaN."""
    reference = expected.double()
    return ((actual.double() - reference).norm() / reference.norm()).item()
