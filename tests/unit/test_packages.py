"""The extra `vision`: recognised by its modules and DALI's version, refused with the cure."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from moa_megatron import packages
from moa_megatron.recipes import RefusedError

ROOT = Path(__file__).parents[2]


def test_the_packages_are_those_of_the_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = {r.name: r for r in map(Requirement, extras["optional-dependencies"]["vision"])}
    assert set(packages.VISION.values()) == set(needs)
    for found in ("1.53.0", "2.0.0", "2.4.0", "3.0.0"):
        served = packages.dali_version_problem(found) is None
        assert served == needs["nvidia-dali-cuda130"].specifier.contains(found), found


def test_the_extra_is_here_and_none_of_it_is_imported() -> None:
    script = (
        "import sys; from moa_megatron import packages; packages.require_vision();"
        "print([name for name in (*packages.VISION, 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_all_missing_packages_are_named_with_both_cures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(RefusedError) as refused:
        packages.require_vision()
    for text in ("(mlxtend, scikit-learn)", "./launch/setup.sh vision", "EXTRAS=vision"):
        assert text in str(refused.value)


@pytest.mark.parametrize("name", ["nvidia-dali-cuda130", "nvidia-dali-cuda120"])
def test_an_older_dali_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version", {name: "1.53.0"}.get)
    with pytest.raises(RefusedError, match=r"DALI 1.53.0 is outside >=2.0,<3: ./launch/setup.sh"):
        packages.require_vision()
