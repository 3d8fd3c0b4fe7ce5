"""Known wrong ways to place and reduce gates, each as a name that a case can ask for.

They are mistakes that train silently (``moa_megatron.gates`` has the right ways in a table).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from moa_megatron import gates, grouped_linear
from moa_megatron.gates import MoAGate
from moa_megatron.grouped_linear import MoAGroupedGate
from moa_megatron.mlp import MoASharedExpertMLP

Forward = Callable[[MoAGate, Tensor, bool], Tensor]
_right_forward: Forward = MoAGate.forward
_right_grouped_forward = MoAGroupedGate.forward
_COPY = "copy_to_tensor_model_parallel_region"


def _no_copy(gate: MoAGate, x: Tensor, routed: bool = False) -> Tensor:
    """The partial sums of a rank's own columns are taken for the gradient."""
    with mock.patch.object(gates, "copy_to_tensor_model_parallel_region", lambda t, group: t):
        return _right_forward(gate, x, routed)


def _gather_without_sum(gate: MoAGate, x: Tensor, routed: bool = False) -> Tensor:
    def gather(logits: Tensor, group: Any, **_: Any) -> Tensor:
        return gather_from_sequence_parallel_region(logits, False, group)

    with mock.patch.object(gates, "gather_from_sequence_parallel_region", gather):
        return _right_forward(gate, x, routed)


def _expert_copies_logits(gate: MoAGate, x: Tensor, routed: bool = False) -> Tensor:
    """Completes the gate's gradient, but the dispatcher sums that of x a second time."""
    if gate.scope != "expert":
        return _right_forward(gate, x, routed)
    return copy_to_tensor_model_parallel_region(
        gates.gate_logits(x, gate.weight), group=gate.tp_group
    )


def _layer_copies_routed_logits(gate: MoAGate, x: Tensor, routed: bool = False) -> Tensor:
    logits = _right_forward(gate, x, routed)
    return copy_to_tensor_model_parallel_region(logits, group=gate.tp_group) if routed else logits


def _layer_copies_scalars(gate: MoAGate, x: Tensor, routed: bool = False) -> Tensor:
    return copy_to_tensor_model_parallel_region(gate.weight, group=gate.tp_group)


def _grouped_copies_logits(gate: MoAGroupedGate, x: Tensor, counts: Sequence[int]) -> Tensor:
    """As ``_expert_copies_logits``, for all experts of the rank."""
    with mock.patch.object(grouped_linear, _COPY, lambda t, group: t):
        logits = _right_grouped_forward(gate, x, counts)
    return copy_to_tensor_model_parallel_region(logits, group=gate.groups.expt_tp)


def _detached(shared: MoASharedExpertMLP, preact: Tensor) -> Tensor:
    """What an overlapped path without a gradient to its gates would be."""
    (coefficients,), shared._coefficients = shared._coefficients, ()
    return shared._mix(preact, coefficients.detach())


def _forward(wrong: Forward) -> Any:
    return mock.patch.object(MoAGate, "forward", wrong)


def _marks(**marks: Any) -> Any:
    """The right attributes, then wrong ones in their place, on gates of one scope."""
    scope, right = marks.pop("scope"), MoAGate._mark

    def mark(gate: MoAGate, *arguments: Any) -> None:
        right(gate, *arguments)
        for name, value in marks.items() if gate.scope == scope else ():
            setattr(gate.weight, name, value)

    return mock.patch.object(MoAGate, "_mark", mark)


_AVERAGE = {"sequence_parallel": False, "average_gradients_across_tp_domain": True}

WRONG: dict[str, Callable[[], Any]] = {
    "no_copy": lambda: _forward(_no_copy),
    "gather_without_sum": lambda: _forward(_gather_without_sum),
    "dense_no_sequence_sum": lambda: _marks(scope="dense", sequence_parallel=False),
    "dense_sequence_sum": lambda: _marks(scope="dense", sequence_parallel=True),
    "dense_average": lambda: _marks(scope="dense", **_AVERAGE),
    "expert_copies_logits": lambda: _forward(_expert_copies_logits),
    "expert_sequence_sum": lambda: _marks(scope="expert", sequence_parallel=True),
    "expert_as_ordinary": lambda: _marks(scope="expert", allreduce=True),
    "layer_no_sequence_sum": lambda: _marks(scope="layer", sequence_parallel=False),
    "layer_average": lambda: _marks(scope="layer", **_AVERAGE),
    "layer_as_expert": lambda: _marks(scope="layer", allreduce=False),
    "layer_copies_routed_logits": lambda: _forward(_layer_copies_routed_logits),
    "layer_copies_scalars": lambda: _forward(_layer_copies_scalars),
    "grouped_no_copy": lambda: mock.patch.object(grouped_linear, _COPY, lambda t, group: t),
    "grouped_copies_logits": lambda: mock.patch.object(
        MoAGroupedGate, "forward", _grouped_copies_logits
    ),
    "grouped_unsaved": lambda: mock.patch.object(
        MoAGroupedGate, "sharded_state_dict", lambda *_, **__: {}
    ),
    "shared_stages_without_gate": lambda: mock.patch.object(
        MoASharedExpertMLP, "_mix_overlapped", _detached
    ),
    "unsaved": lambda: mock.patch.object(MoAGate, "sharded_state_dict", lambda *_, **__: {}),
}


@contextmanager
def applied(name: str | None) -> Iterator[None]:
    """Within, gates are wrong in the named way; right for None."""
    with WRONG[name]() if name is not None else nullcontext():
        yield
