"""The one collective of Megatron's that gloo lacks: all_gather of tensors of unequal sizes."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

_all_gather = dist.all_gather


class _Done:
    """Stands for the handle of a collective that has already finished."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _padded_all_gather(
    outputs: Sequence[torch.Tensor], tensor: torch.Tensor, group: dist.ProcessGroup | None
) -> None:
    numel = max(output.numel() for output in outputs)
    sent = tensor.new_zeros(numel)
    sent[: tensor.numel()] = tensor.detach().reshape(-1)
    received = [tensor.new_empty(numel) for _ in outputs]
    _all_gather(received, sent, group=group)
    with torch.no_grad():
        for output, padded in zip(outputs, received, strict=True):
            output.copy_(padded[: output.numel()].view_as(output))


@functools.wraps(_all_gather)
def all_gather(
    tensor_list: list[torch.Tensor],
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """As torch.distributed.all_gather, but each rank's part may have a size of its own.

    The alltoall token dispatcher under expert tensor parallelism and layer-wise optimizers need it.
    """
    if len({output.numel() for output in tensor_list}) <= 1:
        return _all_gather(tensor_list, tensor, group=group, async_op=async_op)
    _padded_all_gather(tensor_list, tensor, group)
    return _Done() if async_op else None


def install() -> None:
    """Rebind torch.distributed.all_gather, through which Megatron calls it."""
    dist.all_gather = all_gather
