"""Recipes: ``launch/recipes/NAME.yaml`` -> defaults of Megatron's own argument parser.

A recipe names Megatron's arguments (and ``moa_*``) with their values and may inherit one other. Its
values become the parser's defaults, so every flag on the command line overrides them, and
``--set key=value`` reaches also the switches that Megatron can only turn on.

Importing this module stays cheap (no torch): launchers use it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from moa_megatron.config import MoAConfig, nearest

RECIPES = Path(__file__).resolve().parents[1] / "launch" / "recipes"
_VARIANTS = ("fixed", "la", "type1", "one", "bi", "qd")

_EPILOG = """\
examples:
  python -m moa_megatron.pretrain tiny-moe --run-dir runs/first
  python -m moa_megatron.pretrain tiny-moe --run-dir runs/qd --moa-variant qd --lr 2e-3
  python -m moa_megatron.pretrain tiny-moe --run-dir runs/relu2 --moa-mixing fixed \\
      --set swiglu=false --squared-relu

Every flag of Megatron and every --moa-* flag may follow; --help-all lists them."""


class RefusedError(ValueError):
    """Configuration or input that no retry can cure: printed without traceback, exit code 78."""


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What the user asked for, before Megatron's parser sees it."""

    recipe: str
    run_dir: Path
    settings: dict[str, Any]
    flags: list[str]
    exit_file: Path | None
    dry_run: bool
    help_all: bool


def parse_command_line(argv: list[str]) -> CommandLine:
    """Splits recipe and run options from the flags that Megatron parses.

    Raises:
        RefusedError: for a malformed ``--set`` or a missing recipe or run folder.
    """
    parser = Parser(
        prog="moa_megatron.pretrain",
        description="Pretrain a language model from a recipe, on Megatron's training loop.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = ", ".join(available())
    parser.add_argument("recipe", nargs="?", help=f"one of {names}, or a path to a .yaml file")
    parser.add_argument("--run-dir", type=Path, help="folder of this run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override any recipe key, such as --set swiglu=false",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    parser.add_argument("--help-all", action="store_true", help="list Megatron's flags as well")
    parser.add_argument("--exit-file", type=Path, help=argparse.SUPPRESS)
    known, flags = parser.parse_known_args(argv)
    if known.recipe is None and not known.help_all:
        raise RefusedError(f"no recipe given: choose one of {names}")
    if known.recipe is not None and known.recipe.startswith("-"):
        raise RefusedError(f"the recipe comes first, before {known.recipe}")
    if known.run_dir is None and not (known.help_all or known.dry_run):
        raise RefusedError("--run-dir is missing: name the folder of this run, such as runs/first")
    return CommandLine(
        recipe=known.recipe or "",
        run_dir=(known.run_dir or Path("runs/dry-run")).resolve(),
        settings=dict(parse_setting(text) for text in known.set),
        flags=flags,
        exit_file=known.exit_file,
        dry_run=known.dry_run,
        help_all=known.help_all,
    )


class Parser(argparse.ArgumentParser):
    """Bad options are refusals, code 78, not argparse's 2."""

    def error(self, message: str) -> NoReturn:
        raise RefusedError(message)


def parse_setting(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise RefusedError(f"--set {text}: write it as key=value, such as --set swiglu=false")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RefusedError(f"--set {text}: the value is not valid YAML ({error})") from error


def available() -> list[str]:
    """Names of the recipes that ship with the project; ``paper*`` are bases, no models."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml") if not p.stem.startswith("paper"))


def language_models() -> list[str]:
    """Those of ``available`` that are trained on text."""
    return [name for name in available() if load(name).get("moa_model") != "mae"]


def load(name: str) -> dict[str, Any]:
    """The values of one recipe, with those it inherits.

    Raises:
        RefusedError: unknown recipe, unreadable file, or a circle of ``inherits``.
    """
    return _load(name, ())


def _load(name: str, children: tuple[str, ...]) -> dict[str, Any]:
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise RefusedError(
            f"recipe {name!r} does not exist{nearest(name, available())} "
            f"Recipes: {', '.join(available())}"
        )
    if name in children:
        raise RefusedError(f"recipe {name!r} inherits itself through {' -> '.join(children)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise RefusedError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RefusedError(f"recipe {path} must map argument names to values")
    if "variants" in values:
        _check_variants(path, values["variants"])
    parent = values.pop("inherits", None)
    if parent is None:
        return values
    inherited = _load(str(parent), (*children, name))
    variants = {key: dict(changes) for key, changes in inherited.pop("variants", {}).items()}
    # What a recipe states itself holds for all its variants.
    for changes in variants.values():
        for key in values:
            changes.pop(key, None)
    for variant, changes in values.pop("variants", {}).items():
        variants[variant] = {**variants.get(variant, {}), **changes}
    return {**inherited, **values, **({"variants": variants} if variants else {})}


def _check_variants(path: Path, variants: Any) -> None:
    sound = isinstance(variants, dict) and all(isinstance(v, dict) for v in variants.values())
    unknown = sorted(map(str, set(variants) - set(_VARIANTS))) if sound else []
    if unknown or not sound:
        raise RefusedError(
            f"recipe {path}: variants must map {', '.join(_VARIANTS)} to arguments, such as "
            f"fixed: {{lr: 2.0e-3}}{'; unknown: ' + ', '.join(unknown) if unknown else ''}"
        )


def of_variant(
    recipe: dict[str, Any], settings: dict[str, Any], flags: list[str]
) -> dict[str, Any]:
    """The recipe's values for the variant that is asked for, without its key ``variants``.

    ``variants`` maps ``fixed``, ``la``, ``type1``, ``one``, ``bi`` and ``qd`` to values of their
    own: learning rates are tuned per variant.
    """
    common = {key: value for key, value in recipe.items() if key != "variants"}
    variants = recipe.get("variants") or {}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("moa_mixing", "moa_variant"):
        value = settings.get(name, settings.get(name.replace("_", "-"), common.get(name)))
        default = value or getattr(MoAConfig, name.removeprefix("moa_"))
        parser.add_argument("--" + name.replace("_", "-"), nargs="?", default=default)
    asked = parser.parse_known_args(flags)[0]
    variant = asked.moa_variant if asked.moa_mixing == "moa" else asked.moa_mixing
    return {**common, **variants.get(variant, {})}


def set_defaults(
    parser: argparse.ArgumentParser, recipe: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Makes recipe values and ``--set`` overrides the defaults of ``parser``.

    Raises:
        RefusedError: with every unknown key and every value of a wrong type.
    """
    by_name = _actions_by_name(parser)
    problems: list[str] = []
    for origin, values in (("recipe", recipe), ("--set", settings)):
        for key, value in values.items():
            action = by_name.get(str(key).replace("-", "_"))
            if action is None:
                hint = nearest(str(key).replace("-", "_"), list(by_name))
                problems.append(f"{origin}: {key!r} is no argument of Megatron or MoA{hint}")
                continue
            try:
                parser.set_defaults(**{action.dest: _convert(action, str(key), value)})
            except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
                problems.append(f"{origin}: {key}={value!r}: {error}")
    if problems:
        raise RefusedError("\n".join(problems))


def _actions_by_name(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Every argument by its destination and by the name of each of its flags."""
    names: dict[str, argparse.Action] = {}
    for action in parser._actions:
        for option in action.option_strings:
            names[option.lstrip("-").replace("-", "_")] = action
    for action in reversed(parser._actions):
        names[action.dest] = action
    return names


def _convert(action: argparse.Action, key: str, value: Any) -> Any:
    if value is None:
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError("a switch takes true or false")
        if key.replace("-", "_") == action.dest:
            return value
        return action.const if value else not action.const
    values = value if isinstance(value, list) else [value]
    kind = action.type or str
    converted = [_convert_one(kind, item) for item in values]
    for item in converted:
        if action.choices is not None and item not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise ValueError(f"not one of {', '.join(known)}{nearest(str(item), known)}")
    is_list = action.nargs in ("+", "*") or isinstance(action.nargs, int)
    return converted if is_list else converted[0]


def _convert_one(kind: Any, value: Any) -> Any:
    if kind is int:
        if isinstance(value, bool) or int(value) != float(value):
            raise ValueError("must be a whole number")
        return int(value)
    if kind is float:
        return float(value)
    return kind(str(value)) if callable(kind) else value


def given_arguments(
    parser: argparse.ArgumentParser, flags: Iterable[str], settings: Iterable[str] = ()
) -> set[str]:
    """Destinations of what the user has set, by flags or by ``--set``."""
    by_name = _actions_by_name(parser)
    by_setting = {by_name[key.replace("-", "_")].dest for key in settings}
    by_flag = {
        option: action.dest for action in parser._actions for option in action.option_strings
    }
    names = (flag.split("=")[0] for flag in flags)
    return by_setting | {by_flag[name] for name in names if name in by_flag}


def refuse_on_error(parser: argparse.ArgumentParser) -> None:
    """Parse errors raise ``RefusedError`` with the nearest flag, not a page of usage."""
    known = [option for action in parser._actions for option in action.option_strings]

    def error(message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            flags = [word for word in message.removeprefix(prefix).split() if word.startswith("-")]
            hints = [
                f"{flag} is no flag of Megatron or MoA{nearest(flag, known)}" for flag in flags
            ]
            message = "\n".join(hints) or message
        raise RefusedError(message)

    parser.error = error  # type: ignore[method-assign]
