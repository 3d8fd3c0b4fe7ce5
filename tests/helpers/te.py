"""Transformer Engine on a CPU: its classes import and build, forwards need a GPU.

The overlay is a tree of the packages that torch and this project leave out; its README says how to
make one. Host mode hides Transformer Engine, so these tests run in processes of their own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import isolated
from tests.helpers.isolated import ROOT

FOLDER = ROOT.parent / "shared" / "te"
ARCHIVE = "overlay-sm90.tar.xz"
NEEDED = ("onnxscript", "einops", "zipp")
TORCH = "2.11.0"


class Missing(Exception):
    """What these tests need and this machine lacks, with the way to get it."""


def environment() -> dict[str, str]:
    """Variables under which a process finds Transformer Engine.

    Raises:
        Missing: the overlay, a C compiler, or a package is not there.
    """
    import torch

    archive = Path(os.environ.get("MOA_TE_OVERLAY") or FOLDER / ARCHIVE)
    if not archive.exists():
        raise Missing(
            f"{archive}, which is not there: put {ARCHIVE} there, or its path, or that of a folder "
            "with its content, into MOA_TE_OVERLAY"
        )
    if not torch.__version__.startswith(TORCH):
        raise Missing(f"torch {torch.__version__}: the overlay is built for {TORCH}")
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise Missing(f"packages {', '.join(absent)}: pip install {' '.join(NEEDED)}")
    overlay = archive if archive.is_dir() else _unpacked(archive)
    paths = {"PYTHONPATH": overlay, "LD_LIBRARY_PATH": _stub(archive)}
    return {
        name: os.pathsep.join([str(path), *filter(None, [os.environ.get(name)])])
        for name, path in paths.items()
    }


def fake_gpu_environment() -> dict[str, str]:
    """Variables under which processes have a GPU that is the CPU (tests/fake_gpu).

    Raises:
        Missing: as ``environment``.
    """
    variables = environment()
    site = ROOT / "tests" / "fake_gpu" / "site"
    paths = [str(site), str(ROOT), variables["PYTHONPATH"]]
    more = {"PYTHONPATH": os.pathsep.join(paths), "NVTE_TORCH_COMPILE": "0"}
    return {**variables, **more, "CUDA_VISIBLE_DEVICES": "0"}


def needed(variables: Callable[[], dict[str, str]] = environment) -> dict[str, str]:
    """Those variables in a test, which is skipped where they cannot be had; in CI it fails."""
    try:
        return variables()
    except Missing as missing:
        reason = f"Transformer Engine on a CPU needs {missing}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)  # CI must not pass because nothing ran
    pytest.skip(reason)


def fake_gpu() -> dict[str, str]:
    """``fake_gpu_environment`` in a test, as ``needed``."""
    return needed(fake_gpu_environment)


def outcomes(file: str, checks: list[str]) -> dict[str, str]:
    """``isolated.outcomes`` beside Transformer Engine, as ``needed``."""
    return isolated.outcomes(file, checks, variables=needed())


def _cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "moa_megatron"


def _unpacked(archive: Path) -> Path:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()[:16]
    folder = _cache() / f"te-{digest}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        with tarfile.open(archive) as content:
            content.extractall(scratch, filter="data")
        _publish(scratch, folder)
    return folder


def _stub(archive: Path) -> Path:
    """The folder of a libcuda.so.1 that Transformer Engine can link against without a driver."""
    if (archive / "stub" / "libcuda.so.1").is_file():
        return archive / "stub"
    sources = [folder / "libcuda_stub.c" for folder in (archive.parent, FOLDER)]
    source = next((path for path in sources if path.is_file()), None)
    compiler = shutil.which("gcc") or shutil.which("cc")
    if source is None or compiler is None:
        raise Missing("a C compiler (gcc), and libcuda_stub.c beside the overlay")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    folder = _cache() / f"libcuda-stub-{digest}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"]
        library = str(scratch / "libcuda.so.1")
        subprocess.run([compiler, *options, library, str(source)], check=True)
        _publish(scratch, folder)
    return folder


def _publish(scratch: Path, folder: Path) -> None:
    try:
        scratch.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(scratch)
