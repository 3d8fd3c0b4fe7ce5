"""The stand-in base and the image built on it, once for all tests."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image import standin
from tests.image.engine import Engine, Result, engine

BASE = "localhost/standin:26.06"
IMAGE = "localhost/moa-megatron:test"
ARGUMENTS = {
    "VERSION": "0.1.0",
    "REVISION": "0123456789abcdef0123456789abcdef01234567",
    "BUILD_DATE": "2026-01-02T03:04:05Z",
    "BASE_DIGEST": f"sha256:{'ab' * 32}",
    "SOURCE": "https://example.org/moa-megatron",
}
# The machine's own way to a package index belongs to the stand-in, as a site's does to its base.
_INDEX = ("PIP_INDEX_URL", "PIP_CERT", "PIP_DEFAULT_TIMEOUT")


def missing() -> str | None:
    """What image tests need and this machine lacks, with the cure."""
    absent = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    if absent:
        return f"image tests need {' and '.join(absent)}: apt-get install {' '.join(absent)}"
    if os.geteuid() != 0:
        return "image tests need root, for debootstrap and for mounts: run them as root"
    return None


@pytest.fixture(scope="session")
def tool() -> Iterator[Engine]:
    reason = missing()
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # Not among pytest's folders, which another session may clean up, mounts and all.
    with engine(Path(tempfile.mkdtemp(prefix="moa-image-"))) as found:
        yield found


@pytest.fixture(scope="session")
def base(tool: Engine) -> str:
    container = tool("from", "scratch").output.split()[-1]
    root = Path(tool("mount", container).output.split()[-1])
    start = time.perf_counter()
    standin.debian(root)
    print(f"Debian and Python took {time.perf_counter() - start:.0f} s", flush=True)
    standin.nvidia(root)
    variables = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    variables |= {"PIP_CONSTRAINT": "/etc/pip/constraint.txt"}
    variables |= {name: os.environ[name] for name in _INDEX if name in os.environ}
    options = [word for pair in variables.items() for word in ("--env", "=".join(pair))]
    tool("config", *options, "--entrypoint", '["/opt/nvidia/nvidia_entrypoint.sh"]', container)
    tool("umount", container)
    tool("commit", "--rm", container, BASE)
    return BASE


@pytest.fixture(scope="session")
def lent() -> tuple[Path, str, str]:
    """The volume with this environment's torch, which the stand-ins of torch and Triton run."""
    import torch

    return Path(torch.__file__).parents[1], "/lent", "ro"


@pytest.fixture(scope="session")
def built(tool: Engine, base: str, lent: tuple[Path, str, str]) -> Result:
    """The log of the build of IMAGE."""
    arguments = [word for pair in ARGUMENTS.items() for word in ("--build-arg", "=".join(pair))]
    start = time.perf_counter()
    result = tool.build(base, IMAGE, *arguments, "--volume", ":".join(map(str, lent)))
    print(f"the image took {time.perf_counter() - start:.0f} s")
    return result
