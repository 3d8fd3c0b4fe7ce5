"""Compares a training run at some layout with the same run on one rank."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.helpers.cases import ONE_RANK, Layout, Model
from tests.helpers.pool import Pool
from tests.helpers.tensors import Tensors, assemble, by_module, relative_error, relative_errors, rms

# Float32 rounding in another order of summation, over four layers and two steps, stays below a
# third of this everywhere in this suite; the known mistakes are four orders of magnitude above.
BOUND = 1e-5


@dataclass
class Result:
    """A training run with its tensors whole again."""

    losses: list[float]
    norms: list[float]
    initial: Tensors
    gradients: Tensors
    weights: Tensors
    differing_replicas: list[str]
    gate_calls: int = 0


def result(runs: list[Any]) -> Result:
    """What the ranks of ``tests.helpers.training.train`` returned, as one."""
    # NaN stands for a rank that saw no loss; a run may also diverge, which the comparison shows.
    losses = next((r.losses for r in runs if not any(map(math.isnan, r.losses))), runs[-1].losses)
    norms = {tuple(run.norms) for run in runs}
    assert len(norms) == 1, f"ranks disagree on the gradient norm: {norms}"
    parts, differing = {}, []
    for kind in ("initial", "gradients", "weights"):
        parts[kind], conflicts = assemble(s for run in runs for s in getattr(run, kind))
        differing += [f"{kind}: {key}" for key in conflicts]
    calls = sum(run.gate_calls for run in runs)
    return Result(losses, runs[0].norms, **parts, differing_replicas=differing, gate_calls=calls)


@dataclass
class Parity:
    """Errors of a run relative to its reference, by what was compared."""

    errors: dict[str, float] = field(default_factory=dict)
    differing_replicas: list[str] = field(default_factory=list)
    gate_calls: int = 0

    def of_gates(self) -> dict[str, float]:
        """Errors of the gates' own gradients."""
        return {
            key: error
            for key, error in self.errors.items()
            if key.startswith("gradient") and ".moa_gate." in key
        }

    def worst(self) -> tuple[str, float]:
        return max(self.errors.items(), key=lambda item: item[1])

    def summary(self) -> str:
        """The margin, said on success too."""
        kinds = dict.fromkeys(("loss", "norm", "gradient", "weight"), 0.0)
        for key, error in self.errors.items():
            kind = key.split()[0]
            kinds[kind] = max(kinds[kind], error)
        lines = [", ".join(f"{kind} {error:.1e}" for kind, error in kinds.items())]
        lines += [f"  {key}: {error:.1e}" for key, error in self.of_gates().items()]
        return "\n".join([*lines, f"  worst {self.worst()[0]}: {self.worst()[1]:.1e}"])

    def check(self, bound: float = BOUND) -> None:
        """Raises AssertionError unless everything agrees."""
        wrong = {key: error for key, error in self.errors.items() if not error <= bound}
        assert not wrong, f"differs by more than {bound}: {wrong}"
        assert not self.differing_replicas, f"replicas differ: {self.differing_replicas}"


def compare(actual: Result, expected: Result) -> Parity:
    """Losses, gradient norms, every gradient and every weight after the last step."""
    errors = {}
    for step, pair in enumerate(zip(actual.losses, expected.losses, strict=True)):
        errors[f"loss of step {step}"] = relative_error(*map(np.float64, pair))
    for step, pair in enumerate(zip(actual.norms, expected.norms, strict=True)):
        errors[f"norm of step {step}"] = relative_error(*map(np.float64, pair))
    for kind in ("gradient", "weight"):
        found = relative_errors(getattr(actual, kind + "s"), getattr(expected, kind + "s"))
        errors |= {f"{kind} {key}": error for key, error in found.items()}
    return Parity(errors, actual.differing_replicas, actual.gate_calls)


class Bench:
    """Runs models at layouts in a pool; each model's one-rank reference runs once."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.reference = functools.cache(self._reference)

    def train(self, model: Model, layout: Layout, **kwargs: Any) -> Result:
        case = "tests.helpers.training:train"
        return result(self.pool.run(case, layout.ranks, model=model, layout=layout, **kwargs))

    def _reference(self, model: Model) -> Result:
        """The run on one rank, from fresh weights, whose gates must all matter."""
        reference = self.train(model, ONE_RANK)
        for key, gradient in by_module(reference.gradients).items():
            assert "moa_gate" not in key or rms(gradient) > 0.0, f"{key}: no gradient to compare"
        return reference

    def place(self, case: str, layout: Layout, **kwargs: Any) -> Tensors:
        """The whole initial weights that a case of ``tests.helpers.training`` reports."""
        runs = self.pool.run(
            f"tests.helpers.training:{case}", layout.ranks, layout=layout, **kwargs
        )
        tensors, conflicts = assemble(shard for run in runs for shard in run.initial)
        assert not conflicts, f"replicas differ: {conflicts}"
        return tensors

    def parity(self, model: Model, layout: Layout, **kwargs: Any) -> Parity:
        """The run at ``layout``, from the reference's initial weights, against the reference."""
        reference = self.reference(model)
        found = compare(self.train(model, layout, initial=reference.initial, **kwargs), reference)
        print(found.summary())
        return found
