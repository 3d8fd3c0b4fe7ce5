"""The table of upstream features in docs/megatron.md says what the checks of flags do."""

from __future__ import annotations

import re

import pytest

from tests.helpers import isolated
from tests.helpers.isolated import ROOT

ANSWERS = {"yes", "emulated", "built", "refused", "none"}


def rows() -> list[tuple[str, list[str], str, str]]:
    """Feature, words of its flags, answer on local modules, answer on Transformer Engine."""
    text = (ROOT / "docs" / "megatron.md").read_text(encoding="utf-8")
    table = text.split("## Upstream features with MoA")[1].split("\n## ")[0]
    found = re.findall(r"^\| ([^|]+) \| `([^`]+)` \| (\w+) \| (\w+) \| [^|]+ \|$", table, re.M)
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(found) == len(lines) - 2, "a row of the table cannot be read"
    return [(name, flags.split(), local, engine) for name, flags, local, engine in found]


def check_answers_are_those_of_the_flags() -> None:
    from moa_megatron import host

    host.install()
    from moa_megatron import arguments, flags, recipes

    wrong = []
    for feature, words, *answers in rows():
        kitchen = words == ["--use-kitchen"]  # Megatron has the flag where the library is installed
        command = recipes.parse_command_line(
            ["tiny-moe", "--run-dir", "unused", *([] if kitchen else words)]
        )
        parsed = arguments.parse(command, host.HOST_ARGS)
        args, moa = parsed.args, parsed.moa
        args.use_kitchen = kitchen
        for module, answer in zip(("local", "transformer_engine"), answers, strict=True):
            args.transformer_impl = module
            problems = flags.problems(args, moa)
            if answer not in ANSWERS or bool(problems) != (answer == "refused"):
                wrong.append((feature, module, answer, problems))
    assert not wrong, wrong


def check_every_forbidden_flag_is_in_the_table() -> None:
    from moa_megatron import flags

    refused = [words for _, words, local, engine in rows() if local == engine == "refused"]
    unnamed = {flags.flag_of(name) for name in flags.FORBIDDEN} - {w for ws in refused for w in ws}
    assert not unnamed, unnamed


def check_each_forbidden_flag_alone_is_refused() -> None:
    from moa_megatron import host

    host.install()
    from moa_megatron import arguments, flags, recipes

    parsed = arguments.parse(
        recipes.parse_command_line(["tiny-moe", "--run-dir", "unused"]), host.HOST_ARGS
    )
    args, moa = parsed.args, parsed.moa
    assert flags.problems(args, moa) == []
    for name in flags.FORBIDDEN:
        before = getattr(args, name, None)
        setattr(args, name, True)
        (problem,) = flags.problems(args, moa)
        assert problem.startswith(flags.flag_of(name)) and "leave it out" in problem
        setattr(args, name, before)


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_features(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
