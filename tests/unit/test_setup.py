"""launch/setup.sh: which packages are asked of uv, and when none are."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = """#!/bin/sh
echo "$@" >>uv.log
[ ! -f fails ] || exit 1
[ ! -f slow ] || sleep 0.5
mkdir -p .venv
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What setup.sh reads, with a uv that installs nothing."""
    for name in ("launch/setup.sh", "pyproject.toml", "uv.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "launch/recipes", tmp_path / "launch/recipes")
    os.utime(tmp_path / "pyproject.toml", (0, 0))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/uv").write_text(UV)
    (tmp_path / "bin/uv").chmod(0o755)
    return tmp_path


def start(checkout: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name != "MOA_PYTHON"}
    return subprocess.Popen(
        [checkout / "launch/setup.sh", *words],
        env={**kept, "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", **variables},
        cwd=checkout / "bin",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def setup(checkout: Path, *words: str, code: int = 0, **variables: str) -> str:
    """What it says on stderr."""
    process = start(checkout, *words, **variables)
    said = process.communicate()[1]
    assert process.returncode == code, said
    return said


def asked(checkout: Path) -> list[str]:
    """The extras of each call of uv."""
    log = checkout / "uv.log"
    lines = log.read_text().splitlines() if log.exists() else []
    assert all(line.startswith("sync --locked --quiet") for line in lines)
    return [line.removeprefix("sync --locked --quiet").strip() for line in lines]


def test_extras_are_added_and_stay(checkout: Path) -> None:
    setup(checkout)
    setup(checkout)
    assert asked(checkout) == [""]
    assert "with vision" in setup(checkout, "vision")
    setup(checkout, "vision")
    setup(checkout)
    assert asked(checkout) == ["", "--extra vision"]
    setup(checkout, "fast")
    (checkout / "uv.lock").write_text("another")
    setup(checkout)
    assert asked(checkout)[2:] == ["--extra fast --extra vision"] * 2


def test_an_extra_that_the_project_has_given_up_is_forgotten(checkout: Path) -> None:
    setup(checkout, "fast", "vision")
    project = checkout / "pyproject.toml"
    project.write_text(project.read_text().replace("\nfast =", "\nfaster ="))
    setup(checkout)
    assert asked(checkout) == ["--extra fast --extra vision", "--extra vision"]


def test_what_failed_is_done_again(checkout: Path) -> None:
    setup(checkout)
    (checkout / "fails").touch()
    setup(checkout, "vision", code=1)
    (checkout / "fails").unlink()
    setup(checkout)
    setup(checkout, "vision")
    assert asked(checkout) == ["", "--extra vision", "--extra vision"]


def test_unknown_extras_are_named_with_the_known_ones(checkout: Path) -> None:
    said = setup(checkout, "visoin", "vision", "te", code=78)
    assert "no extra is called visoin te: there are fast, vision" in said
    assert "--recipe needs a name" in setup(checkout, "--recipe", code=78)
    assert not asked(checkout)


def test_recipes_of_images_need_vision_and_others_nothing(checkout: Path) -> None:
    named = {}
    for path in sorted((ROOT / "launch/recipes").glob("*.yaml")):
        setup(checkout, "--recipe", path.stem)
        named[path.stem] = asked(checkout).pop()
        shutil.rmtree(checkout / ".venv")
    assert {name for name, extra in named.items() if extra} == {"tiny-mae", "mae-vit-b"}
    assert named["tiny-mae"] == "--extra vision"


@pytest.mark.parametrize(
    ("text", "extra"),
    [
        ("inherits: tiny-mae\nlr: 1.0", "--extra vision"),
        ("'moa_model': \"mae\"  # images", "--extra vision"),
        ("inherits: tiny-mae # its sizes\nmoa_model: gpt", ""),
        ("# moa_model: mae\nmoa_corpus: python", ""),
        ("inherits: nowhere", ""),
        ("inherits: own.yaml", ""),
    ],
)
def test_recipes_of_ones_own(checkout: Path, text: str, extra: str) -> None:
    (checkout / "bin/own.yaml").write_text(text)
    setup(checkout, "--recipe", "own.yaml")  # beside the caller, not in the project's root
    assert asked(checkout) == [extra]


def test_nothing_is_installed_for_a_named_interpreter_or_a_linked_environment(
    checkout: Path,
) -> None:
    setup(checkout, "vision", MOA_PYTHON="python3")
    assert "cannot be run" in setup(checkout, code=78, MOA_PYTHON="/none/python")
    (checkout / "elsewhere").mkdir()
    (checkout / ".venv").symlink_to("elsewhere")
    setup(checkout, "vision")
    assert not asked(checkout)


def test_of_two_at_once_the_second_keeps_what_the_first_installed(checkout: Path) -> None:
    (checkout / "slow").touch()
    first = start(checkout, "vision")
    while not asked(checkout):
        time.sleep(0.01)
    said = setup(checkout)
    assert first.wait() == 0 and "waiting for another" in said
    assert asked(checkout) == ["--extra vision"]


def test_help(checkout: Path) -> None:
    process = start(checkout, "--help")
    assert "usage: ./launch/setup.sh [EXTRA...]" in process.communicate()[0]
    assert process.returncode == 0 and not asked(checkout)
