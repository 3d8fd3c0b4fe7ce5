"""MoAConfig refuses what cannot run, says all of it at once, and travels through flags."""

import argparse
import ast
import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moa_megatron import config as config_module
from moa_megatron.config import (
    ACTIVATION_NAMES,
    MoAConfig,
    add_moa_arguments,
    field_choices,
    moa_config_from_args,
    nearest,
)

PACKAGE = Path(config_module.__file__).parent
FIELDS = [f.name for f in dataclasses.fields(MoAConfig)]

SEVEN = ("gelu", "silu", "relu2", "leaky_relu", "relu", "tanh", "id")


@pytest.mark.parametrize(
    ("variant", "names", "sizes", "gated"),
    [
        ("type1", SEVEN[:5], (5,), False),
        ("one", SEVEN, (7,), True),
        ("bi", SEVEN, (7, 7), True),
        ("qd", ("id", "gelu", "silu", "relu2"), (10,), True),
    ],
)
def test_defaults_of_the_paper(
    variant: Any, names: tuple[str, ...], sizes: tuple[int, ...], gated: bool
) -> None:
    config = MoAConfig(variant=variant)
    assert config.names == names
    assert config.branch_sizes == sizes
    assert config.num_coefficients == sum(sizes)
    assert config.gated == gated
    labels = config.coefficient_names()
    assert len(labels) == len(set(labels)) == sum(sizes)


def test_pairs_are_upper_triangular_and_row_major() -> None:
    config = MoAConfig(variant="qd", dictionary=("id", "silu", "tanh"))
    assert config.pairs == ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
    assert config.coefficient_names()[:2] == ["id*id", "id*silu"]
    assert MoAConfig(dictionary=("id", "silu")).coefficient_names() == [
        "y:id",
        "y:silu",
        "z:id",
        "z:silu",
    ]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"mixing": "mao"}, ["mixing='mao'", "did you mean 'moa'?", "fixed, la, moa"]),
        ({"variant": "type-1"}, ["variant='type-1'", "did you mean 'type1'?"]),
        ({"gate": "xyzzy"}, ["gate='xyzzy' is unknown. Choose from sigmoid, softmax, tanh"]),
        ({"gate_scope": "layers"}, ["gate_scope='layers'", "did you mean 'layer'?"]),
        ({"backend": "compile"}, ["backend='compile'", "did you mean 'compiled'?"]),
        (
            {"dictionary": ("silu", "gelo")},
            ["dictionary='gelo'", "did you mean 'gelu'?", ", ".join(ACTIVATION_NAMES)],
        ),
        ({"dictionary": ("silu", "id", "silu")}, ["dictionary repeats silu", "once"]),
        ({"dictionary": ()}, ["dictionary is empty", "such as 'silu'"]),
        ({"dictionary": "silu"}, ["dictionary='silu'", "sequence", "('silu',)"]),
        ({"mixing": "la", "gate": "tanh"}, ["gate='tanh' with mixing='la'", "mixing='moa'"]),
        ({"mixing": "la", "gate": "softmax"}, ["gate='softmax' with mixing='la'"]),
        ({"leaky_slope": 0.0}, ["leaky_slope=0.0", "(0, 1)", "0.01"]),
        ({"leaky_slope": 1.0}, ["leaky_slope=1.0"]),
        ({"leaky_slope": math.nan}, ["leaky_slope=nan"]),
        ({"gate_init_std": -0.1}, ["gate_init_std=-0.1", "0.02"]),
        ({"gate_init_std": math.nan}, ["gate_init_std=nan"]),
        ({"gate_init_std": math.inf}, ["gate_init_std=inf"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_violation_names_field_value_and_fix(settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match="MoA settings: ") as caught:
        MoAConfig(**settings)
    for part in parts:
        assert part in str(caught.value)


def test_all_violations_come_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        MoAConfig(
            mixing="la",
            variant="bii",  # type: ignore[arg-type]
            gate="tanh",
            dictionary=("id", "id", "selu"),
            leaky_slope=2.0,
            gate_init_std=-1.0,
        )
    message = str(caught.value)
    for part in ("variant='bii'", "gate='tanh'", "'selu'", "repeats id", "leaky_slope=2.0"):
        assert part in message
    assert message.count("; ") >= 5 and "gate_init_std=-1.0" in message


def test_nearest_is_silent_without_a_candidate() -> None:
    assert nearest("gelo", ACTIVATION_NAMES) == ", did you mean 'gelu'?"
    assert nearest("#", ACTIVATION_NAMES) == ""


def test_settings_are_frozen_hashable_and_compare_by_value() -> None:
    config = MoAConfig(dictionary=["id", "silu"])  # type: ignore[arg-type]
    assert config.dictionary == ("id", "silu")
    assert hash(config) == hash(MoAConfig(dictionary=("id", "silu")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.gate = "tanh"  # type: ignore[misc]


CHANGED: dict[str, tuple[list[str], Any]] = {
    "mixing": (["la"], "la"),
    "variant": (["qd"], "qd"),
    "gate": (["softmax"], "softmax"),
    "dictionary": (["relu", "id"], ("relu", "id")),
    "gate_scope": (["expert"], "expert"),
    "leaky_slope": (["0.25"], 0.25),
    "gate_init_std": (["0.2"], 0.2),
    "backend": (["reference"], "reference"),
}


def _parse(flags: list[str]) -> argparse.Namespace:
    return add_moa_arguments(argparse.ArgumentParser()).parse_args(flags)


def test_no_flags_means_the_defaults() -> None:
    arguments = _parse([])
    assert sorted(vars(arguments)) == sorted(f"moa_{name}" for name in FIELDS)
    assert moa_config_from_args(arguments) == MoAConfig()


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_flag_that_round_trips(name: str) -> None:
    words, value = CHANGED[name]
    config = moa_config_from_args(_parse([f"--moa-{name.replace('_', '-')}", *words]))
    assert getattr(config, name) == value != getattr(MoAConfig(), name)
    assert config == MoAConfig(**{name: value})


@pytest.mark.parametrize("name", sorted(field_choices()))
def test_help_lists_the_choices_and_the_default(name: str) -> None:
    actions = add_moa_arguments(argparse.ArgumentParser())._actions
    (text,) = [str(action.help) for action in actions if action.dest == f"moa_{name}"]
    assert all(choice in text for choice in field_choices()[name])
    assert f"default {getattr(MoAConfig(), name)}" in text


def test_wrong_flag_values_are_reported_together() -> None:
    arguments = _parse(["--moa-variant", "b", "--moa-dictionary", "gelo", "--moa-leaky-slope", "3"])
    with pytest.raises(ValueError, match=r"variant='b'.*'gelo'.*leaky_slope=3.0"):
        moa_config_from_args(arguments)


def _reads_within_config() -> dict[str, set[str]]:
    """What each method of MoAConfig reads from self."""
    tree = ast.parse((PACKAGE / "config.py").read_text())
    (body,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "MoAConfig"]
    return {
        method.name: {
            node.attr
            for node in ast.walk(method)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
        }
        for method in body.body
        if isinstance(method, ast.FunctionDef) and method.name != "__post_init__"
    }


def test_every_field_is_read_by_code_outside_config() -> None:
    read = {
        node.attr
        for file in PACKAGE.rglob("*.py")
        if file.name != "config.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith(("config", "moa"))
    }
    through = _reads_within_config()
    for _ in through:
        read |= {name for method in read & set(through) for name in through[method]}
    assert set(FIELDS) <= read, f"fields that nothing reads: {set(FIELDS) - read}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [("moa_megatron.config", ["torch", "megatron"]), ("moa_megatron.op", ["megatron"])],
)
def test_import_stays_light(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print(*(set({absent}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"{module} imports {done.stdout}"


def test_public_names_stay_what_they_are_after_their_modules_are_imported() -> None:
    import moa_megatron
    import moa_megatron.op

    for _ in range(2):
        assert moa_megatron.mixture is moa_megatron.op.mixture
        assert moa_megatron.MoAConfig is MoAConfig
