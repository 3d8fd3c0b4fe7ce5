"""plan_packages.py: the image's packages stay, the lock decides about the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from launch.container import plan_packages
from launch.container.plan_packages import Image, constrain, exact, read_constraints, read_lock

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
