"""What launch/profile.sh and launch/nsys.sh start, with a stand-in for nsys on PATH.

The stand-in records its arguments and, where a test gives it an export, leaves that as its report;
it profiles nothing. nsys itself has not been run by any test.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT
from tests.helpers.nsys_file import training

NSYS, PROFILE = ROOT / "launch" / "nsys.sh", ROOT / "launch" / "profile.sh"
FAKE = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$FAKE_RECORD"
while [ "$1" != --output ]; do shift; done
if [ -n "${FAKE_EXPORT:-}" ]; then cp "$FAKE_EXPORT" "$2.sqlite"; fi
exit "${FAKE_EXIT:-0}"
"""


class Shell:
    """Runs a script in an environment without Slurm, with the stand-in first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.record = folder / "record"
        fake = folder / "bin" / "nsys"
        fake.parent.mkdir()
        fake.write_text(FAKE)
        fake.chmod(0o755)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MOA_"))}
        for name in ("RANK", "NPROC", "DRY_RUN", "GROUP_RANK"):
            kept.pop(name, None)
        self.variables = kept | {
            "PATH": f"{fake.parent}:{os.environ['PATH']}",
            "FAKE_RECORD": str(self.record),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def run(self, *words: str | Path, **extra: str) -> subprocess.CompletedProcess[str]:
        self.record.unlink(missing_ok=True)
        return subprocess.run(
            [str(word) for word in words],
            env=self.variables | extra,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    def nsys_arguments(self) -> list[str]:
        return self.record.read_text().splitlines()

    def option(self, name: str) -> str:
        words = self.nsys_arguments()
        return words[words.index(name) + 1]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def wrapped(shell: Shell, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    extra = {"MOA_PROFILE_DIR": str(shell.record.parent / "first run" / "nsight"), **extra}
    return shell.run(NSYS, *command, **extra)


def test_capture_window_of_megatron(shell: Shell) -> None:
    assert wrapped(shell, "python", "-c", "two words").returncode == 0
    words = shell.nsys_arguments()
    assert words[0] == "profile" and words[-3:] == ["python", "-c", "two words"]
    expected = {
        "--capture-range": "cudaProfilerApi",
        "--capture-range-end": "stop",
        "--sample": "none",
        "--cuda-graph-trace": "node",
        "--force-overwrite": "true",
        "--export": "sqlite",
        "--trace": "nvtx,cuda,cublas,cudnn",
    }
    assert {name: shell.option(name) for name in expected} == expected


def test_names_need_no_slurm_and_use_it(shell: Shell) -> None:
    wrapped(shell, "true")
    folder = str(shell.record.parent / "first run" / "nsight")
    assert shell.option("--output") == f"{folder}/first run-local-node0-rank0"
    assert Path(folder).is_dir()
    slurm = {"SLURM_JOB_ID": "812", "SLURM_NODEID": "3", "SLURM_PROCID": "25"}
    wrapped(shell, "true", **slurm)
    assert shell.option("--output").endswith("/first run-job812-node3-rank25")
    wrapped(shell, "true", RANK="26", MOA_PROFILE_NAME="x", **slurm)
    assert shell.option("--output").endswith("/x-job812-node3-rank26")
    assert "%q" not in shell.record.read_text()


def test_only_selected_ranks_are_wrapped(shell: Shell) -> None:
    for rank, captured in (("0", True), ("1", False), ("8", True), ("80", False)):
        done = wrapped(shell, "echo", "ran", SLURM_PROCID=rank, MOA_PROFILE_RANKS="0 8")
        assert done.returncode == 0
        assert shell.record.exists() == captured
        assert ("ran" in done.stdout) != captured
    wrapped(shell, "true", SLURM_PROCID="5")
    assert shell.record.exists(), "no selection means all"


def test_around_torchrun_a_file_per_node(shell: Shell) -> None:
    for command in (["python", "-m", "torch.distributed.run", "x"], ["/venv/bin/torchrun", "x"]):
        wrapped(shell, *command, SLURM_PROCID="2", SLURM_NODEID="2", MOA_PROFILE_RANKS="0")
        assert shell.option("--output").endswith("-local-node2-rankall")


def test_trace_dry_run_exit_code_and_misuse(shell: Shell) -> None:
    wrapped(shell, "true", MOA_PROFILE_TRACE="nvtx,cuda-sw")
    assert shell.option("--trace") == "nvtx,cuda-sw"
    done = wrapped(shell, "echo", "ran", DRY_RUN="1")
    assert "would capture: nsys profile" in done.stdout and done.stdout.endswith("ran\n")
    assert not shell.record.exists()
    assert wrapped(shell, "true", FAKE_EXIT="75").returncode == 75
    assert wrapped(shell).returncode == 78
    assert "MOA_PROFILE_DIR" in shell.run(NSYS, "true").stderr
    done = wrapped(shell, "true", PATH="/usr/bin:/bin")
    assert done.returncode == 78 and "--torch-profiler" in done.stderr


def test_profile_adds_what_the_user_left_open(shell: Shell, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shell.run(PROFILE, "tiny-moe", "--run-dir", run_dir)
    words = shell.nsys_arguments()
    joined = " ".join(words)
    for part in (
        "--profile --nvtx-ranges",
        "--profile-step-start 10",
        "--profile-step-end 13",
        "--profile-ranks 0",
    ):
        assert joined.count(part) == 1
    assert shell.option("--output") == f"{run_dir}/nsight/run-local-node0-rank0"
    own = ["--profile-step-start=20", "--set", "profile_step_end=22", "--profile-ranks", "1", "2"]
    shell.run(PROFILE, "tiny-moe", "--run-dir", run_dir, *own, RANK="2")
    joined = " ".join(shell.nsys_arguments())
    assert "-step-start 10" not in joined and "-step-end 13" not in joined
    assert "--profile-ranks 0" not in joined and "--profile-ranks 1 2" in joined
    done = shell.run(PROFILE, "tiny-moe", "--run-dir", run_dir, *own, NPROC="2")
    assert "torch.distributed.run" in shell.nsys_arguments(), done.stderr
    assert shell.option("--output").endswith("run-local-node0-rankall")


def test_profile_reports_on_what_nsys_wrote(shell: Shell, tmp_path: Path) -> None:
    export = training().write(tmp_path / "export.sqlite")
    run_dir = tmp_path / "run"
    old = run_dir / "nsight" / "older.sqlite"
    old.parent.mkdir(parents=True)
    old.write_text("of an earlier run")
    os.utime(old, (1, 1))
    done = shell.run(PROFILE, "tiny-moe", "--run-dir", run_dir, FAKE_EXPORT=str(export))
    assert done.returncode == 0, done.stderr
    assert "tools/nsys_report.py" in done.stdout and "older" not in done.stdout
    assert "if exposed communication were hidden" in done.stdout
    assert (run_dir / "nsight" / "report.html").is_file()
    done = shell.run(PROFILE, "tiny-moe", "--run-dir", tmp_path / "empty", FAKE_EXIT="1")
    assert done.returncode == 1 and "wrote no report" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no recipe given"),
        (["--lr", "1"], "the recipe comes first, before --lr"),
        (["tiny-moe", "--trace"], "--trace needs a list"),
        (["tiny-moe", "--use-pytorch-profiler"], "two profilers cannot run at once"),
    ],
)
def test_misuse_is_refused(shell: Shell, words: list[str], message: str) -> None:
    done = shell.run(PROFILE, *words)
    assert done.returncode == 78
    assert done.stderr.startswith("refused: ") and message in done.stderr
    assert not shell.record.exists()


def test_without_nsys_the_cure_is_named(shell: Shell) -> None:
    done = shell.run(PROFILE, "tiny-moe", PATH=os.environ["PATH"])
    assert done.returncode == 78
    assert "nsys is not on PATH" in done.stderr and "--torch-profiler" in done.stderr
    assert "usage: ./launch/profile.sh" in shell.run(PROFILE, "--help").stdout
