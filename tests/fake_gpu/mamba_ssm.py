"""The package ``mamba_ssm`` in plain PyTorch: what Megatron's Mamba layers call in training."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def install() -> None:
    """Makes it importable; before Megatron's import."""
    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")
    inner = [f"{names[-1]}.{name}" for name in ("layernorm_gated", "ssd_combined")]
    modules: list[Any] = [ModuleType(name) for name in (*names, *inner)]
    sys.modules.update({module.__name__: module for module in modules})
    package, *_, norms, scans = modules
    package.__version__ = "2.2.0"
    norms.RMSNorm = RMSNorm
    scans.mamba_split_conv1d_scan_combined = mamba_split_conv1d_scan_combined
    scans.mamba_chunk_scan_combined = None  # imported together, used in inference


class RMSNorm(nn.Module):
    """Over groups of channels; the gate is applied by ``mamba_split_conv1d_scan_combined``."""

    def __init__(self, width: int, eps: float, group_size: int, **words: Any) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size
        weight = torch.ones(width, device=words["device"], dtype=words["dtype"])
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        groups = x.float().unflatten(-1, (-1, self.group_size))
        normed = F.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2)
        return (normed * self.weight.float()).to(x.dtype)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,  # noqa: N803  (the package's name)
    *,
    D: Tensor,  # noqa: N803
    headdim: int,
    ngroups: int,
    **words: Any,
) -> Tensor:
    """Mamba-2's recurrence, a token at a time: h <- exp(dt A) h + dt B x, y = C h + D x."""
    heads = len(A)
    inner = heads * headdim
    states = (zxbcdt.shape[-1] - 2 * inner - heads) // (2 * ngroups)
    z, mixed, dt = zxbcdt.float().split([inner, inner + 2 * ngroups * states, heads], -1)
    taps = conv1d_weight.shape[-1]
    padded = F.pad(mixed.mT, (taps - 1, 0))
    weight, bias = conv1d_weight.float().unsqueeze(1), conv1d_bias.float()
    mixed = F.silu(F.conv1d(padded, weight, bias, groups=len(weight))).mT
    x, b, c = mixed.split([inner, ngroups * states, ngroups * states], -1)
    x = x.unflatten(-1, (heads, headdim))
    b, c = (
        v.unflatten(-1, (ngroups, states)).repeat_interleave(heads // ngroups, 2) for v in (b, c)
    )
    dt = F.softplus(dt + dt_bias)
    state = x.new_zeros(len(x), heads, headdim, states)
    outputs = []
    for t in range(x.shape[1]):
        added = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], b[:, t])
        state = (dt[:, t] * A).exp()[..., None, None] * state + added
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]))
    y = torch.stack(outputs, 1) + D.float()[:, None] * x
    return (y.flatten(-2) * F.silu(z)).to(zxbcdt.dtype)
