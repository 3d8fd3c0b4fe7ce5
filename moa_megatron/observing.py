"""What feedforward layers see on a step that logs: range of their tensors, values of their gates.

Layers ask ``active`` and call ``record``; ``layer_statistics`` reduces and writes. Recording is
on within the forward of a training micro-batch only. That leaves out evaluation, and the second
forward of activation recomputation, which belongs to the backward pass. Everything stays on the
device: nothing here waits for it.

Shape suffixes: T tokens of this rank, P width of fc1's output, D of the hidden vector, n
coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moa_megatron import reference
from moa_megatron.config import MoAConfig

# A gate this near to an end of its range hardly moves any more.
SATURATION = 0.02
# What ``gate_sums`` holds behind the n gates.
SATURATED, ENTROPY, TOKENS = range(3)

active = False


@dataclass
class Seen:
    """What one module has seen since the last ``take``.

    ``preact`` and ``hidden`` are amax, largest absolute value, of what fc1 wrote and of what fc2
    reads (routing weights included); ``gates`` is [n + 3] of ``gate_sums``, or None without gates.
    """

    preact: Tensor
    hidden: Tensor
    gates: Tensor | None


_seen: dict[nn.Module, Seen] = {}


@contextmanager
def recording() -> Iterator[None]:
    """Within, ``active`` layers record."""
    global active
    active = True
    try:
        yield
    finally:
        active = False


def take() -> dict[nn.Module, Seen]:
    """What was seen since the last call, by module."""
    global _seen
    found, _seen = _seen, {}
    return found


@torch.no_grad()
def record(
    module: Any,
    preact: Tensor,
    hidden: Tensor,
    coefficients: Tensor,
    token_weight: Tensor | None = None,
) -> None:
    """Adds one forward of ``module`` to what it has seen.

    Args:
        module: an FFN, with ``moa``, its settings, and ``shows_gate``.
        preact: [..., P], pre-activations with fc1's bias.
        hidden: [..., D], the mixture's output.
        coefficients: [..., n], logits of the gates; LA's scalars are read from its weights instead.
        token_weight: [...], routing weights. A row of weight 0 is padding, by FP8's alignment or
            to an expert's capacity, and its gates do not count.
    """
    found = Seen(amax(preact), amax(hidden), None)
    if module.moa.mixing == "moa" and module.shows_gate:
        found.gates = gate_sums(coefficients, module.moa, token_weight)
    before = _seen.get(module)
    if before is not None:
        found.preact = torch.maximum(before.preact, found.preact)
        found.hidden = torch.maximum(before.hidden, found.hidden)
        if before.gates is not None and found.gates is not None:
            found.gates = before.gates + found.gates
    _seen[module] = found


def amax(values: Tensor) -> Tensor:
    """Largest absolute value, a float32 scalar: 0 where there are none, NaN where one is NaN."""
    if not values.numel():  # an expert without tokens; the shape is known to the host
        return values.new_zeros((), dtype=torch.float32)
    low, high = values.aminmax()  # one pass and no copy of the tensor, unlike abs().amax()
    return torch.maximum(-low, high).float()


def gate_sums(logits: Tensor, moa: MoAConfig, token_weight: Tensor | None = None) -> Tensor:
    """Sums over tokens, float64 [n + 3]; divided by the last they are means.

    The n gate values; the fraction of saturated gates of a token (softmax: of its branches, where
    one activation takes more than 0.98); the entropy of softmax gates, nats, mean of the branches
    (0 for other gates); 1.

    Args:
        logits: [..., n], before the gate function.
        moa: settings of the method.
        token_weight: [...]; tokens of weight 0 do not count.
    """
    logits_Tn = logits.reshape(-1, logits.shape[-1]).float()
    pi_Tn = reference.gate(logits_Tn, moa)
    entropy_T = pi_Tn.new_zeros(len(pi_Tn))
    if moa.gate == "softmax":
        branches = pi_Tn.split(list(moa.branch_sizes), dim=-1)
        tops = torch.stack([branch.amax(-1) for branch in branches], -1)
        saturated_T = (tops > 1 - SATURATION).float().mean(-1)
        entropy_T = torch.stack([torch.special.entr(b).sum(-1) for b in branches], -1).mean(-1)
    else:
        low = 0.0 if moa.gate == "sigmoid" else -1.0
        ends = (pi_Tn < low + SATURATION) | (pi_Tn > 1 - SATURATION)
        saturated_T = ends.float().mean(-1)
    one_T = torch.ones_like(entropy_T)
    rows = torch.cat([pi_Tn, torch.stack([saturated_T, entropy_T, one_T], -1)], -1)
    if token_weight is not None:
        rows = rows * (token_weight.reshape(-1, 1) != 0)
    return rows.sum(0, dtype=torch.float64)
