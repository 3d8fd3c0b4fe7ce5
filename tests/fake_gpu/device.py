"""torch.cuda as one GPU that is the CPU. `site/` installs it in every process."""

from __future__ import annotations

import functools
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch

from moa_megatron.host import collectives, modules, redirect
from tests.fake_gpu import fused_weight_gradient_mlp_cuda, kernels

# Hopper's, or another, as 10.0 for Blackwell.
MAJOR, MINOR = map(int, os.environ.get("MOA_FAKE_GPU", "9.0").split("."))
# What Transformer Engine and GPUs have, host mode does without.
_OWN = ("hybrid.hybrid_block", "transformer.dot_product_attention", "transformer.torch_norm")


def install() -> None:
    """Before Megatron's import."""
    redirect.install()
    properties = SimpleNamespace(
        **{"name": "a host that poses as a GPU", "major": MAJOR, "minor": MINOR},
        **{"total_memory": 80 * 2**30, "multi_processor_count": 132},
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "get_device_properties": properties,
        "get_device_capability": (MAJOR, MINOR),
        "get_device_name": properties.name,
        "is_bf16_supported": True,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **words: _answer)
    torch.cuda._lazy_init = lambda: None  # type: ignore[assignment]
    torch.cuda._lazy_call = lambda function, **words: function()  # type: ignore[assignment]
    torch.cuda.default_generators = (torch.default_generator,)
    # torch's own code, which would pin memory, is told the truth.
    torch.accelerator.is_available = lambda: False
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment, method-assign]
    wrapper = redirect._on_host(torch.Tensor._make_wrapper_subclass)
    torch.Tensor._make_wrapper_subclass = staticmethod(wrapper)  # type: ignore[method-assign]
    torch.Generator = _generator(torch.Generator)  # type: ignore[misc]
    torch.distributed.init_process_group = _on_gloo(torch.distributed.init_process_group)
    group = torch.distributed.ProcessGroup
    group.allgather_into_tensor_coalesced = _by_type(  # type: ignore[method-assign]
        group.allgather_into_tensor_coalesced
    )
    group._start_coalescing = lambda self, device: None  # type: ignore[method-assign]
    group._end_coalescing = lambda self, device: collectives._Done()  # type: ignore[method-assign]
    for name in [name for name in modules.HOOKS if name.endswith(_OWN)]:
        del modules.HOOKS[name]
    modules.install()
    sys.modules["fused_weight_gradient_mlp_cuda"] = fused_weight_gradient_mlp_cuda
    kernels.install()


def _generator(original: Any) -> Any:
    class Anywhere(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, original)

    class Generator(metaclass=Anywhere):
        """torch.Generator of the CPU, whichever device is named."""

        def __new__(cls, device: Any = None) -> Any:
            return original()

    return Generator


def _on_gloo(original: Any) -> Any:
    @functools.wraps(original)
    def initialise(backend: str | None = None, **words: Any) -> None:
        words.pop("device_id", None)
        original("gloo", **words)

    return initialise


def _by_type(original: Any) -> Any:
    """gloo gathers tensors of several element types as if they had the first one's; NCCL does not.

    Megatron gathers FP8 parameters, which are bytes, together with others.
    """

    @functools.wraps(original)
    def gather(group: Any, outputs: Any, inputs: Any, *rest: Any) -> Any:
        for dtype in dict.fromkeys(tensor.dtype for tensor in inputs):
            pairs = [(o, i) for o, i in zip(outputs, inputs, strict=True) if i.dtype == dtype]
            work = original(group, *map(list, zip(*pairs, strict=True)), *rest)
            work.wait()
        return work

    return gather
