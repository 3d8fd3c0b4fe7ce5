"""tools/bench.py --experts, and the check that comes before its numbers."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest

from tests.helpers import isolated
from tests.unit import test_bench

TINY = ["--rows", "48", "--hidden-size", "16", "--width", "12", "--experts-per-rank", "3"]
SCOPES = ("layer", "expert")


def test_every_kind_of_experts_is_timed_over_the_fixed_ones() -> None:
    words = ["--experts", *TINY, "--variants", "qd", "--repeats", "2", "--backend", "reference"]
    found, _ = test_bench.bench(*words)
    test_bench.check_environment(found)
    rows = {row["name"]: row for row in found["results"]}
    assert list(rows) == [
        "sequential fixed",
        *(f"{kind} qd {scope}" for kind in ("sequential", "grouped") for scope in SCOPES),
    ]
    assert rows.pop("sequential fixed")["ratio"]["both"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    for row in rows.values():
        assert row["baseline"] == "sequential fixed"
        assert 0 < row["ratio"]["both"]["min"] <= row["ratio"]["both"]["median"]
        assert set(row["errors"]) == {"output", "x", "probs", "fc1", "fc2", "gate"}
        assert max(row["errors"].values()) < 1e-4


_LOADS = [9, 0, 23]


def _built(kind: str, scope: Any) -> tuple[Any, ...]:
    import torch

    from moa_megatron.config import MoAConfig
    from tools.benchmarks import grouped

    device = torch.device("cpu")
    shape = grouped.Shape("fp32", sum(_LOADS), 16, 12, len(_LOADS))
    inputs = grouped.make_inputs(shape, device, _LOADS)
    moa = MoAConfig(variant="qd", gate_scope=scope, backend="reference")
    return grouped.build(kind, shape, moa, device), shape, inputs


def check_an_expert_may_have_no_tokens() -> None:
    from tools.benchmarks import ffn, grouped

    with ffn.megatron(_cpu()):
        for kind in ("sequential", "grouped"):
            for scope in SCOPES:
                experts, shape, inputs = _built(kind, scope)
                errors = grouped.check(experts, shape, inputs)
                assert max(errors.values()) < 1e-5, (kind, scope, errors)


def check_wrong_experts_give_no_numbers() -> None:
    """Gates of the wrong experts, routing weights applied twice, a lost gradient."""
    from moa_megatron.grouped_linear import MoAGroupedGate
    from tools.benchmarks import ffn, grouped
    from tools.benchmarks.timing import CheckFailed

    gates = MoAGroupedGate.forward
    plain = grouped.forward

    def wrong_gates(gate: Any, x: Any, counts: Any) -> Any:
        return gates(gate, x.flip(0), counts[::-1]).flip(0)

    def twice(experts: Any, inputs: Any) -> Any:
        return plain(experts, inputs) * inputs.probs.unsqueeze(-1)

    def lost(experts: Any, inputs: Any) -> Any:
        """fc1's gradients halved, the values right."""
        output = plain(experts, inputs)
        half = dataclasses.replace(inputs, x=inputs.x.detach())
        return output * 0.5 + plain(experts, half).detach() * 0.5

    with ffn.megatron(_cpu()):
        for name, patch in (
            ("gates", mock.patch.object(MoAGroupedGate, "forward", wrong_gates)),
            ("twice", mock.patch.object(grouped, "forward", twice)),
            ("lost", mock.patch.object(grouped, "forward", lost)),
        ):
            experts, shape, inputs = _built("grouped", "expert")
            with patch, pytest.raises(CheckFailed) as failure:
                grouped.check(experts, shape, inputs)
            expected = "of x" if name == "lost" else "of output"
            assert expected in str(failure.value), (name, str(failure.value))


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS, fresh=True)


@pytest.mark.parametrize("name", CHECKS)
def test_experts(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
