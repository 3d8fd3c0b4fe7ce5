"""check_image.py: each way in which an image can be spoiled is seen, and its cure is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.container import check_image

SCRIPT = str(Path(check_image.__file__))
MEGATRON = "megatron/core/datasets"


def put(site: Path, name: str, version: str, **files: str) -> None:
    """A distribution as pip leaves it: its files, METADATA and RECORD."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    engine = "raise OSError('libcuda.so.1')"  # importing it would fail, as where images are built
    put(folder, "torch", "2.11.0a0+nv26.6", **{"torch/__init__.py": "mark = 'image'"})
    put(folder, "Transformer_Engine", "2.17.0", **{"transformer_engine/__init__.py": engine})
    put(folder, "apex", "0.1", **{"apex/__init__.py": engine, "apex/multi_tensor_apply/a.py": ""})
    put(folder, "numpy", "2.1.0", **{"numpy/__init__.py": ""})
    put(folder, "megatron-core", "0.19.2", **{f"{MEGATRON}/helpers_cpp.cpython-312.so": ""})
    return folder


def check(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-S", SCRIPT, *words]  # -S: only the made-up packages are there
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture
def record(site: Path, tmp_path: Path) -> str:
    file = str(tmp_path / "record.json")
    done = check(site, "record", file)
    assert done.returncode == 0 and "the base image's own" in done.stdout
    assert "numpy" not in done.stdout
    return file


def test_an_untouched_image_passes(site: Path, record: str) -> None:
    put(site, "tqdm", "4.67.1", **{"tqdm/__init__.py": ""})
    (site / "torch" / "__pycache__").mkdir()
    (site / "torch" / "__pycache__" / "x.cpython-312.pyc").write_text("late")
    os.utime(site / "torch" / "__init__.py", (1, 1))  # layers round times
    done = check(site, "verify", record)
    assert done.returncode == 0, done.stderr
    assert "3 protected distributions of the base are unchanged" in done.stdout


def spoil(site: Path, how: str) -> None:
    """One of the ways in which an installation ruins an image."""
    torch = site / "torch-2.11.0a0+nv26.6.dist-info"
    if how == "replaced":
        for file in torch.iterdir():
            file.unlink()
        torch.rmdir()
        put(site, "torch", "2.11.0", **{"torch/__init__.py": "mark = 'index'"})
    elif how == "same version, other files":
        (site / "torch" / "__init__.py").write_text("mark = 'index'")
    elif how == "gone":
        (torch / "METADATA").unlink()
        (torch / "RECORD").unlink()
        torch.rmdir()
    elif how == "cudnn":
        put(site, "nvidia-cudnn-cu13", "9.19", **{"nvidia/cudnn/lib.so": ""})
    elif how == "apex":
        (site / "apex/multi_tensor_apply/a.py").rename(site / "apex/a.py")
        (site / "apex/multi_tensor_apply").rmdir()
    elif how == "helpers":
        (site / MEGATRON / "helpers_cpp.cpython-312.so").unlink()


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("replaced", ("torch of the base image was 2.11.0a0+nv26.6 in", "is 2.11.0 in", "pin it")),
        ("same version, other files", ("torch 2.11.0a0+nv26.6", "other files", "--no-deps")),
        ("gone", ("torch 2.11.0a0+nv26.6 of the base image is gone", "--no-deps")),
        ("cudnn", ("nvidia-cudnn-cu13 9.19 appeared", "shadow", "--no-deps")),
        ("apex", ("apex 0.1 of the base image", "web toolkit", "pip uninstall apex")),
        ("helpers", ("no helpers_cpp*.so", MEGATRON, "install its wheel")),
    ],
)
def test_a_spoiled_image_is_refused(
    site: Path, record: str, how: str, parts: tuple[str, ...]
) -> None:
    spoil(site, how)
    done = check(site, "verify", record)
    assert done.returncode == 78
    assert all(part in done.stderr for part in parts), done.stderr


def test_dali_may_be_added_but_neither_exchanged_nor_doubled(
    site: Path, record: str, tmp_path: Path
) -> None:
    for name in ("nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13"):
        put(site, name, "2.4.0", **{f"{name}/__init__.py": ""})
    assert check(site, "verify", record).returncode == 0
    again = str(tmp_path / "again.json")
    assert "nvidia-dali-cuda130 2.4.0" in check(site, "record", again).stdout
    put(site, "nvidia-dali-cuda120", "2.4.0", **{"doubled/__init__.py": ""})
    (site / "nvidia-nvimgcodec-cu13/__init__.py").write_text("exchanged")
    done = check(site, "verify", again)
    assert done.returncode == 78 and "nvidia-dali-cuda120 2.4.0 appeared" in done.stderr
    assert "nvidia-nvimgcodec-cu13 2.4.0 of the base image has other files" in done.stderr


def test_a_shadowing_copy_is_refused(
    site: Path, record: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "early" / "torch").mkdir(parents=True)
    (tmp_path / "early" / "torch" / "__init__.py").write_text("")
    path = f"{tmp_path / 'early'}{os.pathsep}{site}"
    done = check(path, "verify", record)  # type: ignore[arg-type]
    assert done.returncode == 78 and "module torch was" in done.stderr
    assert "shadows" in done.stderr


def test_the_wrong_apex_is_refused_before_anything_else(site: Path, tmp_path: Path) -> None:
    spoil(site, "apex")
    done = check(site, "record", str(tmp_path / "record.json"))
    assert done.returncode == 78 and not (tmp_path / "record.json").exists()
    assert "pip uninstall apex in the base image" in done.stderr


def test_a_base_without_torch_must_get_it(tmp_path: Path) -> None:
    site, record = tmp_path / "site", str(tmp_path / "record.json")
    put(site, "megatron-core", "0.19.2", **{f"{MEGATRON}/helpers_cpp.so": ""})
    assert "uv.lock's will be installed" in check(site, "record", record).stdout
    assert "neither in the base image nor installed" in check(site, "verify", record).stderr
    put(site, "torch", "2.11.0", **{"torch/__init__.py": ""})
    put(site, "nvidia-cudnn-cu13", "9.19", **{"nvidia/cudnn/lib.so": ""})
    assert check(site, "verify", record).returncode == 0


def test_info_names_versions_and_what_it_is_told(site: Path, record: str) -> None:
    done = check(site, "info", record, "revision=abc", "base_image=nvcr.io/a:1@sha256:00=")
    info = json.loads(done.stdout)
    assert info["base_image"] == "nvcr.io/a:1@sha256:00=" and info["revision"] == "abc"
    assert info["versions"]["transformer-engine"] == "2.17.0"
    assert info["versions"]["flash-attn"] == "absent" and info["torch_from"] == "base"


@pytest.mark.parametrize("words", [(), ("prove", "x"), ("record",)])
def test_wrong_words_show_the_usage(site: Path, words: tuple[str, ...]) -> None:
    done = check(site, *words)
    assert done.returncode == 78 and "check_image.py record FILE" in done.stderr
