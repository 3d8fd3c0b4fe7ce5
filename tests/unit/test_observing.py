"""What is kept of a layer's tensors, against plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moa_megatron import observing
from moa_megatron.config import MoAConfig


def test_amax_is_the_largest_absolute_value() -> None:
    values = torch.tensor([[1.0, -5.0], [3.0, 0.5]])
    assert observing.amax(values).item() == 5.0
    assert observing.amax(values.bfloat16()).dtype == torch.float32
    assert observing.amax(torch.empty(0, 7)).item() == 0.0
    assert observing.amax(torch.tensor([1.0, math.nan])).isnan()
    assert observing.amax(torch.tensor([1.0, -math.inf])).item() == math.inf


@pytest.mark.parametrize(("gate", "low"), [("sigmoid", 0.0), ("tanh", -1.0)])
def test_sums_of_gates(gate: Any, low: float) -> None:
    """Two activations; one gate of the three tokens stands at each end."""
    logits = torch.tensor([[[9.0, 0.0], [0.0, -9.0]], [[0.3, -0.2], [9.0, 9.0]]])
    config = MoAConfig(variant="type1", dictionary=("relu", "id"), gate=gate)
    weight = torch.tensor([[1.0, 0.5], [0.2, 0.0]])  # the last token is padding
    pi = (torch.sigmoid if gate == "sigmoid" else torch.tanh)(logits).reshape(4, 2)
    assert pi.min() < low + 0.02 and pi.max() > 0.98
    expected = [*pi[:3].sum(0).tolist(), 0.5 + 0.5, 0.0, 3.0]
    found = observing.gate_sums(logits, config, weight)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert observing.gate_sums(logits, config)[-1] == 4.0


def test_softmax_counts_branches_and_their_entropy() -> None:
    config = MoAConfig(variant="bi", dictionary=("relu", "id", "tanh"), gate="softmax")
    logits = torch.zeros(2, 6)
    logits[1, 0] = 9.0  # the first branch of the second token is decided
    entropies = [
        -(p * p.log()).sum(-1) for p in (logits[:, :3].softmax(-1), logits[:, 3:].softmax(-1))
    ]
    found = observing.gate_sums(logits, config)
    *means, saturated, entropy, tokens = found.tolist()
    assert saturated == 0.5 and tokens == 2.0
    assert entropy == pytest.approx(float((entropies[0] + entropies[1]).sum() / 2), rel=1e-6)
    assert sum(means[:3]) == pytest.approx(2.0) and sum(means[3:]) == pytest.approx(2.0)
    uniform = observing.gate_sums(torch.zeros(1, 6), config)
    assert uniform[-2].item() == pytest.approx(math.log(3), rel=1e-6)
