"""tools/doctor.py with made-up GPUs: the driver's view, torch's view, a recipe's needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moa_megatron import outline
from tests.helpers.doctor import H100, found, gpus, levels, machine
from tools.doctor_checks import gpu, project, torch_view


def test_gpus(tmp_path: Path) -> None:
    findings = found(gpu.driver, machine(tmp_path, answers=gpus(), driver_cuda=(13, 0)))
    assert {f.level for f in findings.values()} == {"ok"}
    assert findings["GPUs"].value == f"8 x {H100}, 79.6 GiB, capability 9.0"
    mixed = machine(tmp_path, answers=gpus(name="NVIDIA A100"))
    assert levels(gpu.driver, mixed)["GPUs"] == "warning"
    assert levels(gpu.driver, machine(tmp_path)) == {"GPUs": "note"}
    broken = machine(tmp_path, answers={"nvidia-smi --help": ""})
    assert levels(gpu.driver, broken) == {"GPUs": "error"}
    half = machine(tmp_path, answers=gpus(), env={"CUDA_VISIBLE_DEVICES": "0,1"})
    assert levels(gpu.driver, half)["CUDA_VISIBLE_DEVICES"] == "note"


def test_health_of_gpus(tmp_path: Path) -> None:
    assert levels(gpu.health, machine(tmp_path, answers=gpus())) == {"GPU memory": "ok"}
    sick = machine(tmp_path, answers=gpus(ecc_errors_uncorrected_volatile_total="3"))
    assert levels(gpu.health, sick)["GPU 7"] == "error"
    split = machine(tmp_path, answers=gpus(mig_mode_current="Enabled"))
    assert levels(gpu.health, split)["GPU 7"] == "warning"
    lazy = machine(tmp_path, answers=gpus(persistence_mode="Disabled"))
    assert levels(gpu.health, lazy)["persistence"] == "note"
    apps = {" ".join(gpu.APPS): "4711, python, 20000\n"}
    busy = machine(tmp_path, answers={**gpus(memory_used="20000"), **apps})
    held = found(gpu.health, busy)["GPU memory"]
    assert held.level == "warning" and "4711, python, 20000 MiB" in held.message


@pytest.mark.parametrize(
    ("capability", "text"),
    [
        ("8.0", "bf16; not FP8, MXFP8"),
        ("8.9", "bf16, FP8; not MXFP8"),
        ("9.0", "bf16, FP8; not MXFP8"),
        ("10.0", "bf16, FP8, MXFP8"),
        ("12.0", "bf16, FP8; not MXFP8"),
    ],
)
def test_precision_by_capability(tmp_path: Path, capability: str, text: str) -> None:
    host = machine(tmp_path, answers=gpus(1, compute_cap=capability))
    assert found(gpu.precision, host)["precision"].message == text


def test_links(tmp_path: Path) -> None:
    head = "\tGPU0\tGPU1\tGPU2\tCPU Affinity\n"
    full = (
        head
        + "GPU0\t X \tNV18\tNV18\t0-7\nGPU1\tNV18\t X \tNV18\t0-7\nGPU2\tNV18\tNV18\t X \t0-7\n"
    )
    for matrix, level in (
        (full, "ok"),
        (full.replace("NV18", "SYS"), "note"),
        (full.replace("NV18", "SYS", 1), "warning"),
    ):
        host = machine(tmp_path, answers={**gpus(3), "nvidia-smi topo -m": matrix})
        finding = found(gpu.topology, host)["links"]
        assert finding.level == level, finding
    assert finding.message.startswith("2 pairs by NVLink, 1 pairs by SYS")


SEEN: dict[str, Any] = {
    "version": "2.11.0+cu130",
    "cuda": "13.0",
    "available": True,
    "count": 8,
    "gloo": True,
    "nccl": "2.28.9",
    "cudnn": 91900,
    "peers": [],
    "product": 256.0**3,
    "libraries": ["/env/libcudnn.so.9", "/env/libcudnn_ops.so.9", "/env/libnccl.so.2"],
}


@pytest.mark.parametrize(
    ("changed", "driver", "expected"),
    [
        ({}, (13, 0), {"torch": "ok", "NCCL": "ok", "CUDA": "ok"}),
        ({}, (12, 8), {"torch": "error"}),
        ({"cuda": None}, (13, 0), {"torch": "error"}),
        ({"available": False}, (13, 0), {"torch": "error"}),
        ({"nccl": None}, (13, 0), {"NCCL": "error"}),
        ({"product": 1.0}, (13, 0), {"CUDA": "error"}),
        ({"peers": [[0, 1]]}, (13, 0), {"P2P": "note"}),
        ({"gloo": False}, (13, 0), {"gloo": "warning"}),
        (
            {"libraries": ["/env/libcudnn.so.9", "/usr/lib/libcudnn.so.9.2"]},
            (13, 0),
            {"cudnn": "error"},
        ),
        ({"error": "libcudart.so.13: cannot open shared object file"}, None, {"torch": "error"}),
    ],
)
def test_torch(
    tmp_path: Path, changed: dict[str, Any], driver: Any, expected: dict[str, str]
) -> None:
    host = machine(tmp_path, answers=gpus(), driver_cuda=driver, torch={**SEEN, **changed})
    host.facts["distributions"] = {"torch": "2.11.0"}
    host.imports = True
    assert expected.items() <= levels(torch_view.torch, host).items()


def test_no_torch(tmp_path: Path) -> None:
    host = machine(tmp_path, distributions={}, torch_module=False)
    finding = found(torch_view.torch, host)["torch"]
    assert finding.level == "error" and "setup.sh" in finding.cure


@pytest.mark.parametrize(
    ("flags", "value", "level"),
    [
        ([], None, "ok"),
        ([], "1", "note"),
        (["--tensor-model-parallel-size", "2"], "1", "ok"),
        (["--tensor-model-parallel-size", "2"], "8", "error"),
        (["--overlap-moe-expert-parallel-comm"], "1", "warning"),
        (["--use-megatron-fsdp"], "1", "error"),
    ],
)
def test_connections_of_a_recipe(
    tmp_path: Path, flags: list[str], value: str | None, level: str
) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    host = machine(tmp_path, env={} if value is None else {name: value}, answers=gpus())
    host.recipe, host.values = "moe-2b", outline.outline("moe-2b", flags)
    assert levels(project.recipe, host) == {name: level}


def test_precision_of_a_recipe(tmp_path: Path) -> None:
    for flags, level in (
        (["--fp8-format", "hybrid"], "ok"),
        (["--fp8-format", "hybrid", "--fp8-recipe", "mxfp8"], "error"),
    ):
        host = machine(tmp_path, answers=gpus())
        host.recipe, host.values = "moe-2b", outline.outline("moe-2b", flags)
        assert levels(project.recipe, host)["recipe"] == level
