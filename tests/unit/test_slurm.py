"""Slurm's commands where Slurm refuses: stand-ins that say what Slurm says."""

from __future__ import annotations

from pathlib import Path

import pytest

from moa_megatron import slurm

REFUSES_THE_THIRD = """#!/bin/sh
echo x >>{folder}/calls
n=$(wc -l <{folder}/calls)
[ "$n" -lt 3 ] || {{ echo "QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }}
echo "10$n"
"""


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(script.format(folder=folder))
    path.chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    stand_in(tmp_path, "scancel", '#!/bin/sh\necho "$@" >>{folder}/cancelled\n')
    stand_in(tmp_path, "scontrol", "#!/bin/sh\nexit 0\n")
    return tmp_path


def test_a_chain_refused_in_part_leaves_nothing_behind(commands: Path) -> None:
    stand_in(commands, "sbatch", REFUSES_THE_THIRD)
    with pytest.raises(slurm.SlurmError, match="QOSMaxSubmitJobPerUserLimit"):
        slurm.submit_chain(commands, 3)
    assert (commands / "cancelled").read_text() == "101 102\n"
    assert not (commands / "chain.json").exists()
    assert slurm.active_jobs(commands) == []


def test_a_job_that_cannot_be_released_is_taken_back(commands: Path) -> None:
    stand_in(commands, "sbatch", REFUSES_THE_THIRD)
    stand_in(commands, "scontrol", "#!/bin/sh\necho Access denied >&2; exit 1\n")
    with pytest.raises(slurm.SlurmError, match="release 101: Access denied"):
        slurm.submit_chain(commands, 2)
    assert (commands / "cancelled").read_text() == "101 102\n"


def test_a_sweep_trains_without_a_report(
    commands: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(commands, "sbatch", REFUSES_THE_THIRD.replace("-lt 3", "-lt 2"))
    assert slurm.submit_sweep(commands) == ["101"]
    assert "no report will follow" in capsys.readouterr().out
    assert slurm.noted_jobs(commands)[1] == ["101"] and not (commands / "cancelled").exists()


def test_a_busy_controller_is_not_taken_for_no(commands: Path) -> None:
    slurm.note_jobs(commands, ["7", "8"])
    stand_in(commands, "squeue", "#!/bin/sh\necho Socket timed out >&2; exit 1\n")
    with pytest.raises(slurm.SlurmError, match="Socket timed out; try again"):
        slurm.active_jobs(commands)
    stand_in(commands, "squeue", "#!/bin/sh\necho Invalid job id specified >&2; exit 1\n")
    assert slurm.active_jobs(commands) == []
    stand_in(commands, "squeue", "#!/bin/sh\nprintf '8\\n7\\n8\\n'\n")
    assert slurm.active_jobs(commands) == ["7", "8"]


@pytest.mark.parametrize(
    ("changes", "cancelled"),
    [
        ({}, True),
        ({"JobState": "RUNNING"}, False),
        ({"Reason": "TimeLimit"}, False),
        ({"PreemptTime": "2026-11-22T10:00:00"}, False),
        ({"EndTime": "Unknown"}, False),
    ],
)
def test_why_a_job_ends(changes: dict[str, str], cancelled: bool) -> None:
    ending = {
        "JobState": "COMPLETING",
        "Reason": "None",
        "PreemptTime": "None",
        "EndTime": "2026-11-22T10:00:00",
    }
    assert slurm.is_cancelled({**ending, **changes}) is cancelled
    assert not slurm.is_cancelled({}) and slurm.seconds_left({}) == float("inf")


def test_an_element_of_an_array_is_called_by_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert slurm.own_job() == ""
    monkeypatch.setenv("SLURM_JOB_ID", "70")
    assert slurm.own_job() == "70"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm.own_job() == "70_3"
