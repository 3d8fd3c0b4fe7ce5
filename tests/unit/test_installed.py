"""What stands beside Megatron: each reason against it, and its cure."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from moa_megatron import flags, host, installed, packages

FOLDERS = {"toolkit": ("lib",), "nvidia": ("multi_tensor_apply", "optimizers")}


@pytest.fixture(autouse=True)
def modules() -> Iterator[None]:
    """Forgets the packages that a test has made up."""
    with mock.patch.dict(sys.modules):
        yield


def put_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> Path:
    package = tmp_path / "apex"
    for folder in FOLDERS[kind]:
        (package / folder).mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be run')")
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return package


def test_the_wrong_apex_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = put_apex(tmp_path, monkeypatch, "toolkit")
    problem = packages.apex_problem()
    assert problem is not None
    assert str(package) in problem and "pip uninstall apex" in problem
    assert "web toolkit" in problem


def arguments(**values: Any) -> argparse.Namespace:
    """Of a run on local modules, as far as what stands beside them matters."""
    names = ("hybrid_layer_pattern", "overlap_dispatch_backward_with_experts_wgrad", "fp8")
    unset = dict.fromkeys((*names, "sequence_parallel", "gradient_accumulation_fusion"))
    kind = {"moa_model": "gpt", "normalization": "LayerNorm", "transformer_impl": "local"}
    return argparse.Namespace(**(unset | kind | values))


def test_a_run_is_refused_beside_the_wrong_apex(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments()
    assert flags.machine_problems(args) == []
    put_apex(tmp_path, monkeypatch, "toolkit")
    assert flags.machine_problems(args) == [packages.apex_problem()]


def test_norms_under_sequence_parallelism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, torch's refuse it; Apex's LayerNorm does not."""
    monkeypatch.setattr(host, "_installed", True)
    assert flags.machine_problems(arguments(sequence_parallel=True)) == []
    monkeypatch.setattr(host, "_installed", False)
    (problem,) = flags.machine_problems(arguments(sequence_parallel=True))
    assert "--sequence-parallel with --transformer-impl local" in problem
    put_apex(tmp_path, monkeypatch, "nvidia")
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "apex" / "normalization").mkdir()
    assert flags.machine_problems(arguments(sequence_parallel=True)) == []
    root_mean_square = arguments(sequence_parallel=True, normalization="RMSNorm")
    assert flags.machine_problems(root_mean_square) == [problem]


def test_delayed_gradients_of_experts_need_fused_accumulation() -> None:
    name = "overlap_dispatch_backward_with_experts_wgrad"
    (problem,) = flags.machine_problems(arguments(**{name: True}))
    assert "loses gradients of experts" in problem and "Apex" in problem
    fused = arguments(**{name: True}, gradient_accumulation_fusion=True)
    assert flags.machine_problems(fused) == []


def test_nvidias_apex_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_apex(tmp_path, monkeypatch, "nvidia")
    assert packages.apex_problem() is None


def test_no_apex_and_a_hidden_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.apex_problem() is None
    put_apex(tmp_path, monkeypatch, "toolkit")
    monkeypatch.setitem(sys.modules, "apex", None)
    assert packages.apex_problem() is None, "host mode hides it, so it does no harm there"


def with_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, code: str) -> None:
    monkeypatch.setattr(host, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "pytorch.py").write_text(code)
    metadata = tmp_path / "transformer_engine-0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("version", "code", "parts"),
    [
        ("2.17.1", "", None),
        ("2.9.0+5b7f2e1", "", None),
        ("2.5.0", "", ("version 2.5.0 is outside", "pip install", "--transformer-impl local")),
        ("3.0.0", "", ("version 3.0.0 is outside",)),
        ("2.17.1", "raise OSError('libcuda.so.1')", ("does not import (libcuda.so.1)", "build it")),
    ],
)
def test_versions_of_transformer_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, code: str, parts: Any
) -> None:
    with_engine(tmp_path, monkeypatch, version, code)
    problem = installed.transformer_engine_problem()
    if parts is None:
        assert problem is None
    else:
        assert problem is not None and all(part in problem for part in parts), problem


def test_transformer_engine_needs_a_device_and_an_installation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "it needs a CUDA device" in str(installed.transformer_engine_problem())
    monkeypatch.setattr(host, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    assert "it is not installed: pip install" in str(installed.transformer_engine_problem())
