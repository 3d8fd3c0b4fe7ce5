"""Recipes and the command line, without Megatron: inheritance, conversion, clear refusals."""

import argparse
from pathlib import Path

import pytest

from moa_megatron import recipes
from moa_megatron.config import add_moa_arguments
from moa_megatron.recipes import RefusedError


def small_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--swiglu", action="store_true")
    parser.add_argument("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    parser.add_argument("--data-path", nargs="*")
    parser.add_argument("--optimizer", choices=["adam", "muon"])
    return add_moa_arguments(parser)


def parsed(
    recipe: dict[str, object], settings: dict[str, object], *flags: str
) -> argparse.Namespace:
    parser = small_parser()
    recipes.set_defaults(parser, recipe, settings)
    return parser.parse_args(flags)


def test_values_reach_the_parser_and_flags_override() -> None:
    recipe = {"num_layers": 4, "lr": "3e-3", "swiglu": True, "disable_bias_linear": True}
    args = parsed(recipe, {}, "--num-layers", "6")
    assert (args.num_layers, args.lr, args.swiglu, args.add_bias_linear) == (6, 3e-3, True, False)


def test_set_turns_off_what_a_flag_can_only_turn_on() -> None:
    args = parsed({"swiglu": True}, {"swiglu": False, "disable-bias-linear": False})
    assert args.swiglu is False and args.add_bias_linear is True


def test_lists_and_moa_fields() -> None:
    args = parsed({"moa_dictionary": ["id", "silu"], "data_path": "a"}, {})
    assert args.moa_dictionary == ["id", "silu"] and args.data_path == ["a"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"num_layer": 4},
            "'num_layer' is no argument of Megatron or MoA, did you mean 'num_layers'?",
        ),
        ({"num_layers": 4.5}, "must be a whole number"),
        ({"swiglu": "yes"}, "takes true or false"),
        ({"lr": "fast"}, "could not convert"),
        ({"optimizer": "adm"}, "not one of adam, muon, did you mean 'adam'?"),
    ],
)
def test_bad_values_name_key_value_and_cure(recipe: dict[str, object], message: str) -> None:
    with pytest.raises(RefusedError) as refused:
        parsed(recipe, {})
    assert message in str(refused.value)
    assert repr(next(iter(recipe.values()))) in str(refused.value) or "no argument" in message


def test_all_violations_come_at_once() -> None:
    with pytest.raises(RefusedError) as refused:
        parsed({"num_layer": 4, "swiglu": 3}, {"lr": "x"})
    assert len(str(refused.value).splitlines()) == 3


def test_every_recipe_loads_and_inherits() -> None:
    assert {"tiny-dense", "tiny-moe", "dense-0.12b", "moe-2b"} <= set(recipes.available())
    tiny = recipes.load("tiny-moe")
    assert (
        tiny["num_experts"] == 8
        and tiny["hidden_size"] == recipes.load("tiny-dense")["hidden_size"]
    )
    assert "inherits" not in tiny


def test_unknown_recipe_has_a_hint() -> None:
    with pytest.raises(RefusedError, match="did you mean 'tiny-moe'"):
        recipes.load("tiny-mo")


def test_circle_of_inheritance(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(f"inherits: {second}\n")
    second.write_text(f"inherits: {first}\n")
    with pytest.raises(RefusedError, match="inherits itself"):
        recipes.load(str(first))


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n"])
def test_malformed_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RefusedError, match=r"bad\.yaml"):
        recipes.load(str(path))


def test_command_line_splits_off_megatron_flags() -> None:
    command = recipes.parse_command_line(
        ["tiny-moe", "--run-dir", "runs/x", "--set", "swiglu=false", "--lr", "2e-3"]
    )
    assert command.recipe == "tiny-moe" and command.flags == ["--lr", "2e-3"]
    assert command.settings == {"swiglu": False} and command.run_dir.name == "x"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no recipe given"),
        (["tiny-moe"], "--run-dir is missing"),
        (["tiny-moe", "--run-dir", "x", "--set", "swiglu"], "write it as key=value"),
    ],
)
def test_command_line_refusals(argv: list[str], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        recipes.parse_command_line(argv)


def test_unknown_flag_names_the_nearest() -> None:
    parser = small_parser()
    recipes.refuse_on_error(parser)
    with pytest.raises(RefusedError, match="--num-layer is no flag .* did you mean '--num-layers'"):
        parser.parse_args(["--num-layer", "3"])
