"""plan_packages.py: the image's packages stay, the lock decides about the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from launch.container import plan_packages
from launch.container.plan_packages import (
    Image,
    constrain,
    exact,
    read_constraints,
    read_lock,
    requirements,
)

LOCKED = {"torch": "2.11.0", "numpy": "2.5.5", "tqdm": "4.70.1", "transformers": "5.23.0"}
NEEDS = [Requirement(text) for text in ("torch==2.11.*", "transformers>=4.57", "tqdm>=4.66")]
LOCK = """
[[package]]
name = "tqdm"
version = "4.70.1"
source = { registry = "index" }
sdist = { url = "a", hash = "sha256:aa" }
wheels = [{ url = "b", hash = "sha256:bb" }]

[[package]]
name = "moa-megatron"
version = "0.1.0"
source = { editable = "." }
"""


def image(torch: bool = True, installed: dict[str, str] | None = None, **lines: str) -> Image:
    own = {"torch": "2.12.0a0+nv26.6"} if torch else {}
    return Image({**own, **(installed or {})}, lines, torch)


def test_what_the_image_has_and_says_comes_before_the_lock() -> None:
    found = image(installed={"numpy": "2.1.0"}, tqdm="tqdm==4.67.1", click="click<9")
    lines, said = constrain(found, NEEDS, LOCKED, set())
    assert lines == [
        "click<9",
        "numpy==2.1.0",
        "torch==2.12.0a0+nv26.6",
        "tqdm==4.67.1",
        "transformers==5.23.0",
    ]
    assert said == ["torch==2.12.0a0+nv26.6 stays; the project is tested with ==2.11.*"]


def test_only_what_our_requirements_exclude_gives_way() -> None:
    found = image(installed={"transformers": "4.40.0"}, tqdm="tqdm==4.1")
    lines, said = constrain(found, NEEDS, LOCKED, set())
    assert {"transformers==5.23.0", "tqdm==4.70.1"} <= set(lines)
    assert "the image's transformers==4.40.0 is given up: the project needs" in said[2]
    assert "the image's constraint tqdm==4.1 is given up" in said[1]


def test_pins_are_given_up_by_name_but_never_those_of_torch() -> None:
    found = image(installed={"numpy": "2.1.0"})
    lines, said = constrain(found, NEEDS, LOCKED, {"numpy", "torch"})
    assert {"numpy==2.5.5", "torch==2.12.0a0+nv26.6"} <= set(lines)
    assert "the image's numpy==2.1.0 is given up: as asked" in said


def test_a_base_without_torch_gets_the_lock() -> None:
    lines, said = constrain(image(torch=False), NEEDS, LOCKED, set())
    assert lines == sorted(f"{name}=={version}" for name, version in LOCKED.items()) and not said


def item(name: str, version: str, digest: str) -> dict[str, Any]:
    archive = {"hash": f"sha256={digest}", "hashes": {"sha256": digest}}
    return {
        "metadata": {"name": name, "version": version},
        "download_info": {"url": "x", "archive_info": archive},
    }


def test_exact_requirements_carry_the_locks_hashes_and_leave_cuda_out() -> None:
    report = {
        "install": [
            item("tqdm", "4.70.1", "bb"),
            item("Rich", "15.0", "cc"),
            item("nvidia-cudnn-cu13", "9.19", "dd"),
        ]
    }
    lines, kept_out = exact(report, image(), read_lock(LOCK))
    assert lines == [
        "tqdm==4.70.1 --hash=sha256:aa --hash=sha256:bb",
        "rich==15.0 --hash=sha256:cc",
    ]
    assert kept_out == ["nvidia-cudnn-cu13 9.19"]
    lines, kept_out = exact(report, image(torch=False), read_lock(LOCK))
    assert len(lines) == 3 and not kept_out


DALI = "nvidia-dali-cuda130"
CODECS = {"nvidia-nvimgcodec-cu13": "0.9.0", "nvidia-nvjpeg": "13.3.2", DALI: "2.4.0"}


@pytest.mark.parametrize(
    ("installed", "planned", "pinned"),
    [
        ({}, [DALI, "nvidia-nvimgcodec-cu13"], f"{DALI}==2.4.0"),
        ({"nvidia-nvimgcodec-cu13": "0.9.1"}, [DALI], f"{DALI}==2.4.0"),
        ({DALI: "2.1.0"}, [], f"{DALI}==2.1.0"),
        ({DALI: "1.53.0"}, [], f"{DALI}==1.53.0"),
        ({"nvidia-dali-cuda120": "1.50.0"}, [], "nvidia-dali-cuda120==1.50.0"),
    ],
)
def test_dali_comes_with_its_codecs_unless_the_image_has_one(
    installed: dict[str, str], planned: list[str], pinned: str
) -> None:
    constraint = {DALI: f"{DALI}==1.53.0"} if planned else {}
    found = image(installed=installed, **constraint)
    need = Requirement(f"{DALI}>=2.0,<3")
    assert found.alone_brings(need.name) == (DALI not in planned), "then it is not asked for"
    lines, said = constrain(found, [need], {DALI: "2.4.0"}, {DALI})
    assert pinned in lines
    given_up = f"the image's constraint {DALI}==1.53.0 is given up"
    assert any(text.startswith(given_up) for text in said) == (DALI in planned)
    too_old = f"{DALI}==1.53.0 stays; the project is tested with <3,>=2.0"
    assert (too_old in said) == (pinned == f"{DALI}==1.53.0")
    report = {"install": [item(name, version, "aa") for name, version in CODECS.items()]}
    chosen = {line.split("==")[0] for line in exact(report, found, read_lock(LOCK))[0]}
    assert chosen == set(planned)


def test_extras_are_pyproject_tomls() -> None:
    project = {"dependencies": ["tqdm"], "optional-dependencies": {"vision": [DALI], "fast": []}}
    for extras in ([], ["none"], ["fast"]):
        assert [need.name for need in requirements(project, extras)] == ["tqdm"]
    assert [need.name for need in requirements(project, ["vision"])] == ["tqdm", DALI]
    with pytest.raises(ValueError, match="EXTRAS=visoin: .* use vision, fast, none"):
        requirements(project, ["visoin"])


def test_files_that_the_lock_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tqdm==4.70.1.*sha256:ee.*not in uv.lock"):
        exact({"install": [item("tqdm", "4.70.1", "ee")]}, image(), read_lock(LOCK))


def test_constraint_files_are_read_as_pip_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "constraint.txt"
    file.write_text(
        "# pins\nTyping_Extensions==4.1 # why\nfoo==1; python_version < '3'\n"
        "torch==2.11.0a0+nv26.6; python_version >= '3'\nhttps://example.org/x.whl\n\n"
    )
    assert read_constraints(str(file)) == {
        "typing-extensions": "Typing_Extensions==4.1",
        "torch": "torch==2.11.0a0+nv26.6",
    }
    assert read_constraints("") == {}
    with pytest.raises(ValueError, match="PIP_CONSTRAINT=.*gone.txt is not there"):
        read_constraints(str(tmp_path / "gone.txt"))


def test_the_projects_own_lock_is_readable() -> None:
    lock = read_lock((plan_packages.ROOT / "uv.lock").read_text())
    assert lock["versions"]["megatron-core"] == "0.19.2" and "moa-megatron" not in lock["versions"]
    assert all(lock["hashes"][pair] for pair in lock["versions"].items())
