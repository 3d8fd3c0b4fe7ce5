"""Steps of Transformer Engine's optimisers and of gradient clipping, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def adam(
    chunk: int,
    overflow: Tensor,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """``tex.multi_tensor_adam``: Adam, with the decay decoupled (AdamW) or in the gradient."""
    if overflow.item():
        return
    corrections = [1 - beta**step if bias_correction else 1.0 for beta in (beta1, beta2)]
    for grad, parameter, mean, square, *main in zip(*lists, strict=True):
        weight = (main or [parameter])[0].float()
        grad = grad.float() if decoupled else grad.float() + weight_decay * weight
        mean.copy_(beta1 * mean.float() + (1 - beta1) * grad)
        square.copy_(beta2 * square.float() + (1 - beta2) * grad.square())
        change = (mean.float() / corrections[0]) / ((square.float() / corrections[1]).sqrt() + eps)
        weight = weight - lr * (change + (weight_decay * weight if decoupled else 0))
        for target in (parameter, *main):
            target.copy_(weight)


def sgd(
    chunk: int,
    overflow: Tensor,
    lists: list[list[Tensor]],
    weight_decay: float,
    momentum: float,
    dampening: float,
    lr: float,
    nesterov: bool,
    first: bool,
    decay_last: bool,
    factor: float,
) -> None:
    """``tex.multi_tensor_sgd``: in float32, with momentum."""
    assert not decay_last, "not emulated"
    if overflow.item():
        return
    for grad, parameter, kept in zip(*lists, strict=True):
        change = grad.float() * factor + weight_decay * parameter
        if momentum:
            kept.copy_(change if first else momentum * kept + (1 - dampening) * change)
            change = change + momentum * kept if nesterov else kept
        parameter.sub_(lr * change)


def l2norm(
    chunk: int, overflow: Tensor, lists: list[list[Tensor]], each: bool = False
) -> tuple[Tensor, Tensor]:
    """``tex.multi_tensor_l2norm``: of all tensors together, and of each."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), norms if each else torch.zeros(1)


def scaled(chunk: int, overflow: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """``tex.multi_tensor_scale``: the second list from the first; notes what is not finite."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * factor)
        if not source.isfinite().all():
            overflow.fill_(1)


KERNELS: dict[str, Callable[..., Any]] = {
    "multi_tensor_adam": adam,
    "multi_tensor_sgd": sgd,
    "multi_tensor_l2norm": l2norm,
    "multi_tensor_scale": scaled,
    "multi_tensor_scale_tensor": scaled,
}
