"""tools/doctor.py: packages, compilers, Slurm, containers, the project, differences of nodes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from moa_megatron import packages
from tests.helpers.doctor import found, gpus, levels, machine
from tools.doctor_checks import cluster, differences, images, libraries, nodes, project, report
from tools.doctor_checks.host import Finding

GOOD = {"torch": "2.11.0", "megatron-core": "0.19.2", "emerging-optimizers": "0.3.7"}
CONFIG = "JobRequeue = 1\nKillWait = 90 sec\nPreemptMode = OFF\nMaxArraySize = 1001\n"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {"megatron-core": "ok", "emerging-optimizers": "ok"}),
        ({"megatron-core": "0.18.0"}, {"megatron-core": "error"}),
        ({"torch": "2.12.0a0+nv26.6"}, {"torch": "warning"}),
        ({"torch": "2.11.0a0+eb65b36"}, {"megatron-core": "ok"}),
    ],
)
def test_pinned_versions(tmp_path: Path, changed: dict[str, str], expected: dict[str, str]) -> None:
    host = machine(tmp_path, distributions={**GOOD, **changed})
    assert expected.items() <= levels(libraries.megatron, host).items()
    assert set(GOOD) == set(libraries.pins(host)), "pyproject.toml pins these"


def test_missing_megatron_and_its_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = machine(tmp_path, distributions={"torch": "2.11.0"})
    assert levels(libraries.megatron, host)["megatron-core"] == "error"
    assert packages.helpers_problem() is None
    monkeypatch.setattr(packages, "_HELPERS", "megatron/core/models")
    assert "helpers_cpp" in str(packages.helpers_problem())


@pytest.mark.parametrize(
    ("extra", "requires", "level"),
    [
        ({"nvidia-cudnn-cu13": "9.19"}, ["nvidia-cudnn-cu13==9.19"], "ok"),
        ({"nvidia-cudnn-cu13": "9.19"}, [], "warning"),
        (
            {"nvidia-cudnn-cu12": "9.1", "nvidia-cudnn-cu13": "9.19"},
            ["nvidia-cudnn-cu13==9.19"],
            "warning",
        ),
    ],
)
def test_copies_of_cudnn(
    tmp_path: Path, extra: dict[str, str], requires: list[str], level: str
) -> None:
    answers = {"ldconfig -p": "libcudnn.so.9 => /usr/lib/libcudnn.so.9"}
    distributions = {**GOOD, **extra}
    host = machine(tmp_path, answers=answers, distributions=distributions, torch_requires=requires)
    finding = found(libraries.copies, host)["cudnn"]
    assert finding.level == level
    assert ("shadows the system's" in finding.message) == (requires == [])


@pytest.mark.parametrize(
    ("version", "parts", "level", "text"),
    [
        (None, None, "note", "not installed"),
        ("2.17.0", None, "warning", "empty meta package"),
        ("2.17.0", (), "warning", "without its PyTorch part"),
        ("2.17.0", ("pytorch/__init__.py",), "warning", "without its PyTorch part"),
        ("2.5.0", ("pytorch/__init__.py", "transformer_engine_torch.so"), "warning", "outside"),
        ("2.17.0", ("pytorch/__init__.py", "transformer_engine_torch.so"), "ok", "2.17.0"),
    ],
)
def test_transformer_engine(
    tmp_path: Path, version: str | None, parts: tuple[str, ...] | None, level: str, text: str
) -> None:
    folder = None if parts is None else tmp_path / "site" / "transformer_engine"
    for part in parts or ():
        assert folder is not None
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).touch()
    known = {} if version is None else {"transformer-engine": version}
    host = machine(tmp_path, answers=gpus(), distributions=known, engine_folder=folder)
    finding = found(libraries.transformer_engine, host)["Transformer Engine"]
    assert finding.level == level and text in finding.message, finding
    if level == "warning":  # and an error where the recipe asks for it
        host.values = {"transformer_impl": "transformer_engine"}
        assert levels(libraries.transformer_engine, host) == {"Transformer Engine": "error"}


def test_an_engine_built_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "transformer_engine"
    (folder / "pytorch").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "pytorch" / "__init__.py").write_text(
        "raise ImportError('undefined symbol: _ZN3c10')"
    )
    (tmp_path / "transformer_engine_torch.so").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    known = {"transformer-engine": "2.17.0"}
    host = machine(tmp_path, answers=gpus(), distributions=known, engine_folder=str(folder))
    host.imports = True
    finding = found(libraries.transformer_engine, host)["Transformer Engine"]
    assert finding.level == "warning" and "undefined symbol: _ZN3c10" in finding.message


def test_the_wrong_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(libraries.apex, machine(tmp_path)) == {"apex": "ok"}
    (tmp_path / "apex" / "lib").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    finding = found(libraries.apex, machine(tmp_path))["apex"]
    assert finding.level == "error" and "pip uninstall apex" in finding.cure


@pytest.mark.parametrize(
    ("versions", "level", "text", "cure"),
    [
        ({}, "note", "not installed", "./launch/setup.sh vision"),
        ({"cuda130": "2.4.0"}, "ok", "2.4.0", ""),
        ({"cuda120": "2.0.0"}, "ok", "2.0.0", ""),
        ({"cuda130": "1.53.0"}, "warning", "DALI 1.53.0 is outside", "setup.sh vision"),
        ({"cuda130": "2.4.0", "cuda120": "2.4.0"}, "warning", "overwrite", "uninstall all but"),
    ],
)
def test_dali(tmp_path: Path, versions: dict[str, str], level: str, text: str, cure: str) -> None:
    known = {f"nvidia-dali-{cuda}": version for cuda, version in versions.items()}
    host = machine(tmp_path, distributions=known)
    finding = found(images.dali, host)["DALI"]
    assert finding.level == level and text in finding.message and cure in finding.cure
    if level != "ok":  # where the recipe is of images, nothing runs without it
        host.values = {"moa_model": "mae"}
        assert levels(images.dali, host) == {"DALI": "error"}


def test_dali_decodes_here_and_a_broken_one_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = machine(tmp_path, distributions={"nvidia-dali-cuda130": "2.4.0"})
    host.imports = True
    finding = found(images.dali, host)["DALI"]
    assert finding.level == "ok" and "decodes JPEG on the CPU (" in finding.message
    monkeypatch.setattr(images, "_TOLERANCE", -1)
    finding = found(images.dali, host)["DALI"]
    assert finding.level == "warning" and "pixels are off by" in finding.message
    monkeypatch.setattr(images, "_CODE", "raise ImportError('libcuda.so.1: no version')")
    finding = found(images.dali, host)["DALI"]
    assert finding.level == "warning" and "does not import: ImportError: libcuda" in finding.message


def test_a_gpu_that_cannot_decode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"cpu": 1, "mixed": "nvJPEG error (5)"}
    monkeypatch.setattr(
        images, "_CODE", f"assert DECODERS[1] == ('mixed', 0); print('{json.dumps(said)}')"
    )
    host = machine(tmp_path, answers=gpus(), distributions={"nvidia-dali-cuda130": "2.4.0"})
    host.imports = True
    finding = found(images.dali, host)["DALI"]
    assert finding.level == "warning"
    assert "decodes no JPEG on the GPU: nvJPEG error (5)" in finding.message
    assert "driver" in finding.cure


def test_compilers(tmp_path: Path) -> None:
    gcc = {"g++ --version": "g++ 12\n", "gcc --version": "gcc 12\n", "nvcc --version": "13"}
    facts = {"python_header": True}
    assert levels(libraries.compilers, machine(tmp_path, answers=gcc, **facts)) == {
        "C++ compiler": "ok"
    }
    assert levels(libraries.compilers, machine(tmp_path, **facts)) == {"C++ compiler": "warning"}
    on_gpu = machine(tmp_path, answers=gpus(), **facts)
    assert levels(libraries.compilers, on_gpu) == {"C compiler": "error", "nvcc": "note"}
    no_header = machine(tmp_path, answers={**gpus(), **gcc}, python_header=False)
    assert levels(libraries.compilers, no_header)["Python headers"] == "error"
    named = machine(tmp_path, env={"CXX": "icpx"}, answers=gcc, **facts)
    assert levels(libraries.compilers, named)["CXX"] == "warning"


@pytest.mark.parametrize(
    ("old", "new", "name", "level"),
    [
        ("KillWait = 90", "KillWait = 30", "KillWait", "note"),
        ("JobRequeue = 1", "JobRequeue = 0", "JobRequeue", "warning"),
        ("PreemptMode = OFF", "PreemptMode = CANCEL", "PreemptMode", "warning"),
        ("PreemptMode = OFF", "PreemptMode = GANG,SUSPEND", "PreemptMode", "note"),
        ("MaxArraySize = 1001", "MaxArraySize = 11", "MaxArraySize", "note"),
    ],
)
def test_settings_of_slurm(tmp_path: Path, old: str, new: str, name: str, level: str) -> None:
    answers = {"sbatch --version": "", "scontrol show config": CONFIG}
    good = levels(cluster.slurm, machine(tmp_path, answers=answers))
    assert set(good.values()) == {"ok"} and "KillWait" not in good
    answers["scontrol show config"] = CONFIG.replace(old, new)
    assert levels(cluster.slurm, machine(tmp_path, answers=answers))[name] == level


def test_slurm_that_is_silent_and_tasks_that_do_not_fit(tmp_path: Path) -> None:
    silent = machine(tmp_path, answers={"sbatch --version": ""})
    assert levels(cluster.slurm, silent)["Slurm settings"] == "warning"
    env = {"SLURM_JOB_ID": "1", "SLURM_GPUS_PER_NODE": "h100:8", "SLURM_NTASKS_PER_NODE": "4"}
    assert levels(cluster.slurm, machine(tmp_path, env=env))["tasks"] == "warning"
    env["SLURM_NTASKS_PER_NODE"] = "8"
    assert "tasks" not in levels(cluster.slurm, machine(tmp_path, env=env))


def test_containers(tmp_path: Path) -> None:
    assert found(cluster.container, machine(tmp_path / "a"))["container"].message == "none"
    (tmp_path / "b" / "home" / "me" / ".local" / "lib").mkdir(parents=True)
    files = {
        "/.singularity.d/x": "",
        "/proc/mounts": "overlay / overlay ro,relatime 0 0\nnfs:/home /home nfs rw 0 0\n",
    }
    host = machine(tmp_path / "b", files, {"HOME": "/home/me"})
    findings = found(cluster.container, host)
    assert findings["container"].message == "Apptainer" and findings["root"].level == "note"
    assert findings["home"].level == "warning" and "PYTHONNOUSERSITE" in findings["home"].cure
    host.env = {"HOME": "/home/me", "PYTHONNOUSERSITE": "1"}
    assert "home" not in found(cluster.container, host)


def test_environment_out_of_step(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    host = machine(tmp_path, {"uv.lock": "new"}, prefix=str(tmp_path / ".venv"))
    host.project = tmp_path
    assert levels(project.environment, host) == {"environment": "note"}
    for stamp, level in (("old", "warning"), ("new", "ok")):
        (tmp_path / ".venv" / ".moa-lock").write_text(stamp)
        assert levels(project.environment, host) == {"environment": level}
    host.facts["prefix"] = "/usr"
    assert levels(project.environment, host) == {"environment": "warning"}


def test_what_the_patches_say() -> None:
    assert project.patched(True, "placed 6 left ", "").level == "ok"
    left = project.patched(True, "placed 5 left compile_helpers", "")
    assert left.level == "error" and "compile_helpers" in left.message
    assert "No module" in project.patched(False, "", "ModuleNotFoundError: No module").message


def told(host: str, rank: int, **more: Any) -> dict[str, Any]:
    versions = {"torch": "2.11.0", "driver": "580.95", **more.pop("versions", {})}
    findings = [vars(Finding("ok", name, text, value=text)) for name, text in versions.items()]
    return {"host": host, "rank": rank, "local": 0, "findings": findings, "free": 100, **more}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {"nodes": "ok", "clocks": "ok", "run folder": "ok"}),
        ({"versions": {"torch": "2.10.0"}}, {"torch differs": "error"}),
        ({"versions": {"driver": "570.1"}}, {"driver differs": "warning"}),
        ({"offset": -0.3}, {"clocks": "note"}),
        ({"offset": 12.0}, {"clocks": "warning"}),
        ({"sees": False}, {"run folder": "error"}),
        ({"free": 10}, {"free disk differs": "warning"}),
    ],
)
def test_differences_between_nodes(changed: dict[str, Any], expected: dict[str, str]) -> None:
    reports = [told("n1", 0), told("n2", 1, sees=True), told("n3", 2, **{"sees": True, **changed})]
    found = {finding.check: finding for finding in differences.compare(reports)}
    assert expected.items() <= {name: f.level for name, f in found.items()}.items()
    if "torch differs" in found:
        assert "2.10.0 on n3" in found["torch differs"].message


def test_first_node_and_place_in_a_step(tmp_path: Path) -> None:
    for names, first in (
        ("n[1-2]", "n1"),
        ("gpu[07-09,12]-ib,b1", "gpu07-ib"),
        ("alone", "alone"),
        ("a1,b[2-3]", "a1"),
        ("", ""),
    ):
        assert nodes.first_node(names) == first
    env = {
        "SLURM_PROCID": "9",
        "SLURM_NTASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "4321",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
        "SLURM_STEP_NODELIST": "n[1-2]",
    }
    host = machine(tmp_path, env=env, addresses={"n1": ["10.0.0.1"]})
    step = nodes.Step.of(host)
    assert (step.rank, step.several, step.address, step.port) == (9, True, "n1", 30321)
    host.facts["addresses"] = {}
    host.answers = {"scontrol show node -o n1": "NodeName=n1 NodeAddr=10.0.0.9 State=IDLE"}
    host.env = {**env, "SLURM_STEP_TASKS_PER_NODE": "1(x16)"}
    step = nodes.Step.of(host)
    assert (step.several, step.address) == (False, "10.0.0.9")
    with pytest.raises(ValueError, match="SLURM_PROCID is not set; start it by srun"):
        nodes.Step.of(machine(tmp_path))


def test_report() -> None:
    findings = [
        Finding("ok", "torch", "2.11.0", group="torch"),
        Finding("error", "disk", "full", "free some", group="storage"),
    ]
    text = report.text(findings)
    assert "\x1b" not in text and "\x1b[31" in report.text(findings, colour=True)
    assert "ERROR  disk   full" in text and "-> free some" in text
    assert text.endswith("not ready: 1 error, 0 warnings, 0 notes, 1 ok")
    assert "2.11.0" not in report.text(findings, quiet=True)
    said = json.loads(json.dumps(report.record(findings, "n1")))
    assert said["exit_code"] == 1 and said["counts"]["error"] == 1 and len(said["findings"]) == 2
    reports = [
        {"host": name, "rank": rank, "findings": [vars(finding) for finding in findings]}
        for rank, name in enumerate(("n1", "n2"))
    ]
    merged = report.merged(reports, [])
    assert [f.message for f in merged] == ["2.11.0", "full [all nodes]"]
    assert re.search(
        r"full \[n1\]", report.merged([reports[0], {**reports[1], "findings": []}], [])[1].message
    )
