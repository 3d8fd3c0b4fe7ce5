"""What an image without torch gets: planned for real, without its 4 GB being fetched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from launch.container.plan_packages import read_lock

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_base_without_torch_gets_exactly_the_lock(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "launch/container", copy / "launch/container")
    for name in ("pyproject.toml", "uv.lock"):
        shutil.copy(ROOT / name, copy)
    venv.create(tmp_path / "bare", with_pip=True, symlinks=True)
    python = str(tmp_path / "bare/bin/python")
    # Older ones download what they only plan to install; so do newer ones from an index without
    # separate metadata, unless they may read it out of the wheels.
    subprocess.run([python, "-m", "pip", "install", "--quiet", "pip>=24"], check=True)
    plan = {"MOA_PYTHON": python, "PLAN_ONLY": "1", "PIP_USE_FEATURE": "fast-deps"}
    done = subprocess.run(
        [copy / "launch/container/install.sh", "packages"],
        env={**os.environ, **plan, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0
    assert "torch: absent, uv.lock's will be installed" in done.stdout
    assert json.loads((copy / "base-image.json").read_text())["torch_from"] == "lock"
    planned = dict(re.findall(r"([\w-]+)==([^\s,]+)", done.stdout.split("packages to install:")[1]))
    locked = read_lock((ROOT / "uv.lock").read_text())["versions"]
    assert {"torch", "triton", "nvidia-nccl-cu13", "megatron-core"} <= planned.keys()
    assert planned == {name: locked[name] for name in planned}
    assert not (tmp_path / "bare/lib/python3.12/site-packages/torch").exists()
