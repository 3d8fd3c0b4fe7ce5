"""Every choice of the method in one frozen dataclass; the ``--moa-*`` flags come from its fields.

Importing this module must stay cheap (no torch): launchers and preflight checks use it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

ACTIVATION_NAMES = ("id", "relu", "relu2", "leaky_relu", "gelu", "silu", "tanh")

_TYPE1 = ("gelu", "silu", "relu2", "leaky_relu", "relu")
DEFAULT_DICTIONARIES: dict[str, tuple[str, ...]] = {
    "type1": _TYPE1,
    "one": (*_TYPE1, "tanh", "id"),
    "bi": (*_TYPE1, "tanh", "id"),
    "qd": ("id", "gelu", "silu", "relu2"),
}


def _choice(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint ``, did you mean 'x'?`` or the empty string, for error messages."""
    match = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {match[0]!r}?" if match else ""


@dataclass(frozen=True)
class MoAConfig:
    """Settings of the feedforward layers; symbols as in the method paper, equations 1-10.

    Raises:
        ValueError: with every violation, each naming the field, its value and the fix.
    """

    mixing: Literal["fixed", "la", "moa"] = _choice(
        "moa", "fixed: Megatron's own FFN; la: learnable coefficients; moa: token-adaptive gates"
    )
    variant: Literal["type1", "one", "bi", "qd"] = _choice(
        "bi", "type1: ungated FFN; one: mixture on the linear branch; bi: on both; qd: all pairs"
    )
    gate: Literal["sigmoid", "softmax", "tanh"] = _choice("sigmoid", "gate function of MoA")
    dictionary: tuple[str, ...] | None = _choice(
        None, "activations, separated by spaces; default: the paper's for the variant"
    )
    gate_scope: Literal["layer", "expert"] = _choice(
        "layer", "MoE: one set of gates for all FFNs of a layer, or one for each expert"
    )
    leaky_slope: float = _choice(0.01, "slope of leaky_relu for negative input")
    gate_init_std: float = _choice(0.02, "standard deviation of the gate vectors at initialisation")
    backend: Literal["auto", "triton", "compiled", "reference"] = _choice(
        "auto", "implementation of the mixture; auto takes the fastest that runs here"
    )

    encoded: ClassVar[str]

    def __post_init__(self) -> None:
        if self.dictionary is not None and not isinstance(self.dictionary, str):
            object.__setattr__(self, "dictionary", tuple(self.dictionary))
        problems = self._choice_problems() + self._dictionary_problems()
        if self.mixing == "la" and self.gate != "sigmoid":
            problems.append(
                f"gate={self.gate!r} with mixing='la': learnable activations have no gates; "
                "leave it at its default or use mixing='moa'"
            )
        if not 0.0 < self.leaky_slope < 1.0:
            problems.append(f"leaky_slope={self.leaky_slope}: must lie in (0, 1), such as 0.01")
        if not 0.0 <= self.gate_init_std < float("inf"):
            problems.append(
                f"gate_init_std={self.gate_init_std}: must be finite and not negative, such as 0.02"
            )
        if problems:
            raise ValueError("MoA settings: " + "; ".join(problems))
        # One string that is all of this: operators of torch take no other kind of setting.
        object.__setattr__(self, "encoded", json.dumps(dataclasses.asdict(self)))

    @staticmethod
    @functools.cache
    def decode(encoded: str) -> MoAConfig:
        """The config whose ``encoded`` this is."""
        return MoAConfig(**json.loads(encoded))

    def _choice_problems(self) -> list[str]:
        problems = []
        for name, choices in field_choices().items():
            value = getattr(self, name)
            if value not in choices:
                problems.append(
                    f"{name}={value!r} is unknown{nearest(str(value), choices) or '.'} "
                    f"Choose from {', '.join(choices)}"
                )
        return problems

    def _dictionary_problems(self) -> list[str]:
        if self.dictionary is None:
            return []
        if isinstance(self.dictionary, str):
            return [
                f"dictionary={self.dictionary!r} is not a sequence: write ({self.dictionary!r},)"
            ]
        if not self.dictionary:
            return ["dictionary is empty: name at least one activation, such as 'silu'"]
        problems = [
            f"dictionary={name!r} is unknown{nearest(name, ACTIVATION_NAMES) or '.'} "
            f"Choose from {', '.join(ACTIVATION_NAMES)}"
            for name in self.dictionary
            if name not in ACTIVATION_NAMES
        ]
        duplicates = sorted({n for n in self.dictionary if self.dictionary.count(n) > 1})
        if duplicates:
            problems.append(
                f"dictionary repeats {', '.join(duplicates)}: name each activation once"
            )
        return problems

    @property
    def names(self) -> tuple[str, ...]:
        """The dictionary in force, K names."""
        return (
            self.dictionary if self.dictionary is not None else DEFAULT_DICTIONARIES[self.variant]
        )

    @property
    def gated(self) -> bool:
        """Whether the FFN is Type-II (two up-projections, y and z)."""
        return self.variant != "type1"

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Index pairs (k, l), k <= l, row-major: the order of the coefficients of ``qd``."""
        size = len(self.names)
        return tuple((k, m) for k in range(size) for m in range(k, size))

    @property
    def branch_sizes(self) -> tuple[int, ...]:
        """Coefficients per branch; softmax normalises within a branch."""
        size = len(self.names)
        return {"type1": (size,), "one": (size,), "bi": (size, size), "qd": (len(self.pairs),)}[
            self.variant
        ]

    @property
    def num_coefficients(self) -> int:
        """n: gates of a token (MoA) or scalars of a layer (LA)."""
        return sum(self.branch_sizes)

    def coefficient_names(self) -> list[str]:
        """One label per coefficient, in their order: ``y:silu``, ``z:id``, ``id*gelu``."""
        names = self.names
        if self.variant == "qd":
            return [f"{names[k]}*{names[m]}" for k, m in self.pairs]
        branches = {"type1": ["y"], "one": ["z"], "bi": ["y", "z"]}[self.variant]
        return [f"{branch}:{name}" for branch in branches for name in names]


def field_choices() -> dict[str, tuple[str, ...]]:
    """Allowed values of the fields that have a closed set."""
    hints = typing.get_type_hints(MoAConfig)
    return {
        f.name: typing.get_args(hints[f.name])
        for f in dataclasses.fields(MoAConfig)
        if typing.get_origin(hints[f.name]) is Literal
    }


def add_moa_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """One ``--moa-*`` flag per field. Values are checked by ``MoAConfig``, all at once."""
    group = parser.add_argument_group("mixture of activations")
    hints = typing.get_type_hints(MoAConfig)
    choices = field_choices()
    for f in dataclasses.fields(MoAConfig):
        flag, text = "--moa-" + f.name.replace("_", "-"), f.metadata["help"]
        if f.name in choices:
            text += f" ({' | '.join(choices[f.name])}; default {f.default})"
            group.add_argument(flag, default=f.default, help=text)
        elif isinstance(hints[f.name], types.UnionType):
            group.add_argument(flag, nargs="+", default=None, metavar="NAME", help=text)
        else:
            group.add_argument(flag, type=float, default=f.default, help=f"{text} ({f.default})")
    return parser


def moa_config_from_args(args: argparse.Namespace) -> MoAConfig:
    """The config that a parsed namespace describes; it may come from a checkpoint."""
    values = {f.name: getattr(args, "moa_" + f.name) for f in dataclasses.fields(MoAConfig)}
    return MoAConfig(**values)
