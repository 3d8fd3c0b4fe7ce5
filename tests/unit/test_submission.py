"""What is handed to Slurm: time limits, sweeps, checks, scripts."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import submit
from moa_megatron import outline, packages, submission
from moa_megatron.submission import Job, seconds
from moa_megatron.sweeps import make_points as sweep_points


def job(folder: Path, **changes: Any) -> Job:
    plain = Job(
        recipe="tiny-moe",
        flags=["--lr", "1e-3"],
        folder=folder,
        nodes=1,
        procs_per_node=1,
        time="1:00:00",
        grace=300,
        chain=1,
        requeue=False,
        per_rank=False,
        options={"partition": "gpu", "gpus-per-node": "8"},
    )
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10", 600),
        ("10:30", 630),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("1-00:30", 88200),
        ("1-00:00:30", 86430),
        ("0", 0),
        ("soon", None),
        ("1:2:3:4", None),
    ],
)
def test_seconds(text: str, expected: int | None) -> None:
    assert seconds(text) == expected


def test_sweep_points_are_every_combination_with_safe_folders() -> None:
    points = sweep_points(["lr=6e-4,1e-3", "moa-variant=bi,a/b"])
    assert [p["index"] for p in points] == [0, 1, 2, 3]
    assert points[3]["settings"] == {"lr": "1e-3", "moa_variant": "a/b"}
    assert points[3]["run_dir"] == "lr=1e-3,moa_variant=a_b"
    assert sweep_points([]) == []
    for texts, message in (
        (["lr"], "write it as KEY=VALUE"),
        (["lr=1,1"], "there twice"),
        (["lr=1", "lr=2"], "each key once"),
        (["x=/a/b,_a_b"], "share the folder"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep_points(texts)


def test_a_good_job_has_no_problems(tmp_path: Path) -> None:
    assert job(tmp_path / "runs" / "new").problems() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "--nodes 0: must be at least 1"),
        ({"time": "0"}, "--time 0: write minutes"),
        ({"time": "5"}, "--time 5 is not longer than --grace 300 s"),
        ({"chain": 0}, "--chain 0"),
        ({"nodes": 2}, "is on a disk that each node has for itself"),
        ({"container": "/nowhere/x.sqsh"}, "no such file; build or import it first"),
        ({"recipe": "tiny-mo"}, "did you mean 'tiny-moe'"),
        ({"flags": ["--expert-model-parallel-size", "3"]}, "does not divide the experts (8)"),
        ({"flags": ["--global-batch-size=7"]}, "--global-batch-size=7 is not a multiple"),
        ({"flags": ["--set", "num_experts"]}, "write it as key=value"),
        ({"points": sweep_points(["micro_batch_size=1,3"])}, "point micro_batch_size=3: "),
        ({"points": sweep_points(["lr=1e-3,2e-3"])}, "lr is swept, but --lr among the flags"),
        ({"options": {"nodes": "2"}}, "--sbatch nodes: use --nodes"),
        ({"requeue": True}, "--requeue needs --chain K"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:24],
)
def test_problems(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    if changes.get("nodes") == 2:
        tmp_path = Path("/tmp/moa-test-node-local")
    assert any(message in text for text in job(tmp_path / "new", **changes).problems())


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    bad = job(tmp_path / "x", time="x", chain=0, flags=["--expert-model-parallel-size", "3"])
    assert len(bad.problems()) >= 4


def test_folders_that_are_taken(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    assert "has finished" in job(tmp_path).problems()[0]
    (tmp_path / "status.json").write_text('{"state": "stopped"}')
    assert job(tmp_path).problems() == []


def test_the_script_is_valid_bash_and_carries_every_option(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    made = job(
        folder,
        chain=3,
        requeue=True,
        per_rank=True,
        container="image.sqsh",
        mounts="/data:/data",
        flags=["--data-path", "it's", "a b"],
    ).script()
    subprocess.run(["bash", "-n"], input=made, text=True, check=True)
    for text in (
        "#SBATCH --partition=gpu",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --signal=USR1@300",
        "#SBATCH --open-mode=append",
        "export MOA_SUPERVISE='--retry-needs 420 --chain 3 --requeue'",
        "export MOA_CONTAINER=image.sqsh",
        "export MOA_PER_RANK=1",
        ":/data",
    ):
        assert text in made, text
    directives = [line for line in made.splitlines() if line.startswith("#SBATCH --")]
    names = [line.split("=")[0] for line in directives]
    assert len(names) == len(set(names)), "each option once"
    line = next(line for line in made.splitlines() if line.startswith("set -- "))
    words = subprocess.run(
        ["bash", "-c", f'{line}; printf "%s\\n" "$@"'], capture_output=True, text=True, check=True
    )
    assert words.stdout.splitlines() == [
        *("tiny-moe", "--data-path", "it's", "a b", "--run-dir", str(folder))
    ]


def test_a_sweep_has_an_array_and_a_report(tmp_path: Path) -> None:
    points = sweep_points(["lr=1e-3,2e-3"])
    sweep = job(tmp_path, points=points, options={"array": "0-1", "constraint": "a|b"})
    assert (
        f"--sweep {tmp_path}" in sweep.script()
        and "\nset -- tiny-moe --lr 1e-3\n" in sweep.script()
    )
    report = sweep.report_script()
    assert "#SBATCH --array" not in report and "#SBATCH --exclusive" not in report
    assert "#SBATCH --constraint='a|b'" in report, "a site may insist on it"
    assert "export MOA_TOOL=tools/report_sweep.py" in report
    subprocess.run(["bash", "-n"], input=report, text=True, check=True)


def test_options_of_sbatch_replace_what_they_contradict(tmp_path: Path) -> None:
    options = {"mem-per-gpu": "32G", "no-requeue": "", "exclusive": "no", "comment": "a b"}
    made = job(tmp_path, options=options).script()
    assert "#SBATCH --no-requeue\n" in made and "#SBATCH --comment='a b'" in made
    for gone in ("#SBATCH --mem=0", "#SBATCH --requeue", "#SBATCH --exclusive"):
        assert gone not in made, gone


def test_folders_outside_the_project_are_mounted(tmp_path: Path) -> None:
    flags = ["--save", "/scratch/ckpt", "--train-data-path", "0.3", "/data/web/train", "runs/x"]
    made = job(tmp_path / "run", container="image.sqsh", flags=flags).script()
    mounts = f"/data/web:/data/web,/scratch/ckpt:/scratch/ckpt,{tmp_path}/run:{tmp_path}/run"
    assert f"export MOA_MOUNTS={mounts}" in made


def test_profiled_jobs(tmp_path: Path) -> None:
    flags = submission.profile_flags(["--profile-ranks", "0", "8"], torch_profiler=False)
    assert "--profile-ranks" not in flags and flags[-1] == "13"
    profiled = job(tmp_path, nsys=True, flags=["--profile-ranks", "0", "8"]).script()
    assert f"export MOA_PROFILE_DIR={tmp_path}/nsight" in profiled
    assert "export MOA_PROFILE_RANKS='0 8'" in profiled
    assert f"export MOA_WRAP={submission.ROOT}/launch/nsys.sh" in profiled
    sweep = job(tmp_path, nsys=True, points=sweep_points(["lr=1e-3,2e-3"]))
    assert any("--profile with --array-sweep" in text for text in sweep.problems())


def test_outline_reads_flags_as_megatron_would() -> None:
    assert outline.outline("tiny-moe", ["--x", "*-*-"])["x"] == "*-*-"
    words = ["--lr=2e-3", "--sequence-parallel", "--moa-dictionary", "silu", "id"]
    values = outline.outline("tiny-moe", [*words, "--set", "swiglu=false"])
    assert values["lr"] == 2e-3 and values["sequence_parallel"] is True
    assert values["moa_dictionary"] == ["silu", "id"] and values["swiglu"] is False
    assert values["num_experts"] == 8 and values["tensor_model_parallel_size"] == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], None),
        (["--tensor-model-parallel-size", "2"], 1),
        (["--context-parallel-size", "2"], 1),
        (["--overlap-moe-expert-parallel-comm"], 32),
        (["--use-megatron-fsdp", "--tensor-model-parallel-size", "2"], None),
    ],
)
def test_device_connections(flags: list[str], expected: int | None) -> None:
    assert outline.device_connections(outline.outline("tiny-moe", flags)) == expected


def test_only_a_container_may_bring_what_recipes_of_images_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\necho 'refused: {packages.VISION_NEEDED} (x): cure' >&2; exit 78\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(submit, "_ENVIRONMENT", python)
    (problem,) = submit.megatron_problems(job(tmp_path))
    assert problem == f"{packages.VISION_NEEDED} (x): cure"
    assert not submit.megatron_problems(job(tmp_path, container="moa.sqsh"))
    assert "note: the extra vision is not here" in capsys.readouterr().out


def test_a_login_node_needs_neither_torch_nor_megatron() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, megatron=None, numpy=None); "
        "from moa_megatron import attempts, outline, submission; print(submission.ROOT)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(submission.ROOT)
