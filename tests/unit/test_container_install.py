"""install.sh when pip finds no versions: the lock gives way first, then the user is asked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import packaging
import pytest

from tests.unit.test_check_image import put

ROOT = Path(__file__).parents[2]
# Everything but pip is the real interpreter, which sees made-up packages only.
PYTHON = """#!/bin/sh
case "$*" in
*"-m pip --version"*) exit 0 ;;
*"-m pip install"*) ;;
*) exec {python} -S "$@" ;;
esac
echo x >>{log}
n=$(wc -l <{log})
while [ "$1" != --report ]; do shift; done
cp "$(dirname "$2")/constraints.txt" {log}.$n
cp "$(dirname "$2")/wanted.txt" {log}.wanted
[ "$n" -gt {failures} ] || exit 1
echo '{{"install": []}}' >"$2"
"""


def install(folder: Path, failures: int, **variables: str) -> subprocess.CompletedProcess[str]:
    """install.sh packages, where pip fails so many times before it finds versions."""
    for name in ("launch/container", "pyproject.toml", "uv.lock"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, folder / name)
    site = folder / "site"
    put(site, "torch", "2.11.0a0+nv26.6", **{"torch/__init__.py": ""})
    put(site, "numpy", "2.1.0", **{"numpy/__init__.py": ""})
    shutil.copytree(Path(packaging.__file__).parent, site / "packaging")
    python = folder / "python"
    python.write_text(PYTHON.format(python=sys.executable, log=folder / "log", failures=failures))
    python.chmod(0o755)
    known = {"MOA_PYTHON": str(python), "PYTHONPATH": str(site), "PLAN_ONLY": "1"}
    return subprocess.run(
        [folder / "launch/container/install.sh", "packages"],
        env={**os.environ, **known, **variables},
        capture_output=True,
        text=True,
    )


def constraints(folder: Path, attempt: int) -> set[str]:
    return set((folder / f"log.{attempt}").read_text().split())


def test_locked_versions_give_way_to_the_images(tmp_path: Path) -> None:
    done = install(tmp_path, failures=1)
    assert done.returncode == 0, done.stderr
    assert "the locked versions do not go with the image's: others are chosen" in done.stderr
    first, second = constraints(tmp_path, 1), constraints(tmp_path, 2)
    own = {"torch==2.11.0a0+nv26.6", "numpy==2.1.0"}
    assert own <= second < first and "megatron-core==0.19.2" in first
    assert not any(line.startswith("transformers==") for line in second)


def test_without_a_solution_the_cure_is_named(tmp_path: Path) -> None:
    done = install(tmp_path, failures=2)
    assert done.returncode == 78 and "--build-arg UNPIN='NAME NAME'" in done.stderr
    assert "--build-arg EXTRAS=none" in done.stderr


def test_unpinned_packages_may_change(tmp_path: Path) -> None:
    done = install(tmp_path, failures=0, UNPIN="numpy torch")
    assert done.returncode == 0, done.stderr
    assert "the image's numpy==2.1.0 is given up: as asked" in done.stdout
    assert "torch==2.11.0a0+nv26.6" in constraints(tmp_path, 1)


def wanted(folder: Path) -> set[str]:
    return {re.split("[><=]", line)[0] for line in (folder / "log.wanted").read_text().split()}


@pytest.mark.parametrize("extras", [None, "none"])
def test_recipes_of_images_are_served_unless_extras_say_none(
    tmp_path: Path, extras: str | None
) -> None:
    done = install(tmp_path, failures=0, **({} if extras is None else {"EXTRAS": extras}))
    assert done.returncode == 0, done.stderr
    asked = wanted(tmp_path)
    assert ("nvidia-dali-cuda130" in asked) == ("mlxtend" in asked) == (extras is None)
    assert "megatron-core" in asked and "torch" not in asked


def test_an_unknown_extra_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    done = install(tmp_path, failures=0, EXTRAS="visoin")
    assert done.returncode == 78 and "no extra is called visoin: use fast, vision" in done.stderr
    assert not (tmp_path / "log").exists()


def test_a_missing_constraint_file_and_a_wrong_step_are_refused(tmp_path: Path) -> None:
    done = install(tmp_path, failures=0, PIP_CONSTRAINT="/none/constraint.txt")
    assert (
        done.returncode != 0 and "PIP_CONSTRAINT=/none/constraint.txt is not there" in done.stderr
    )
    assert not (tmp_path / "log").exists(), "pip does not run"
    script = ROOT / "launch/container/install.sh"
    done = subprocess.run([script, "all"], capture_output=True, text=True)
    assert done.returncode == 78 and "step=all: use packages, project or user" in done.stderr
