"""status.json, the step of a run folder, and storage errors."""

import errno
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from moa_megatron import runstate


def test_status_round_trip_leaves_no_temporary_file(tmp_path: Path) -> None:
    runstate.write_status(tmp_path, "stopped", runstate.RETRY, step=3)
    runstate.write_status(tmp_path, "finished", runstate.FINISHED, step=6)
    status = runstate.read_status(tmp_path)
    assert status is not None
    assert (status["state"], status["exit_code"], status["step"]) == ("finished", 0, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_unreadable_status_is_none(tmp_path: Path, text: str) -> None:
    assert runstate.read_status(tmp_path) is None
    (tmp_path / "status.json").write_text(text)
    assert runstate.read_status(tmp_path) is None


def test_step_of_a_run_folder(tmp_path: Path) -> None:
    assert runstate.checkpoint_step(tmp_path / "absent") is None
    assert runstate.checkpoint_step(tmp_path) is None
    (tmp_path / "iter_0000004").mkdir()
    assert runstate.checkpoint_step(tmp_path) is None, "a first save that did not complete"
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    (tmp_path / "iter_0000004" / "mp_rank_00").mkdir()
    with pytest.raises(ValueError, match="reads None instead of a step"):
        runstate.checkpoint_step(tmp_path)  # another format, whose completeness nobody knows
    tracker.write_text("4\n")
    assert runstate.checkpoint_step(tmp_path) == 4
    tracker.write_text("")
    with pytest.raises(ValueError, match="no iter_ folder beside it is complete"):
        runstate.checkpoint_step(tmp_path)


@pytest.mark.parametrize("text", ["", "garbage", None])
def test_a_broken_tracker_falls_back_to_the_newest_complete_checkpoint(
    tmp_path: Path, text: str | None
) -> None:
    for step in (2, 10, 12):
        (tmp_path / f"iter_{step:07d}").mkdir()
    for step in (2, 10, 12):
        (tmp_path / f"iter_{step:07d}" / ".metadata").touch()
    for step in (2, 10):  # the last save was cut short just before this
        (tmp_path / f"iter_{step:07d}" / "metadata.json").touch()
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    if text is not None:
        tracker.write_text(text)
    step = runstate.checkpoint_step(tmp_path)
    assert step == 10 and runstate.complete_steps(tmp_path) == [2, 10]
    assert runstate.repair_tracker(tmp_path, step)
    assert tracker.read_text() == "10" and not runstate.repair_tracker(tmp_path, step)
    assert not list(tmp_path.glob(".*.tmp"))


def test_failing_ranks_leave_accounts_in_order_of_time(tmp_path: Path) -> None:
    exit_file = tmp_path / "exit"
    runstate.write_failure(exit_file, 3, 1, "x" * 9999, 7)
    runstate.write_failure(exit_file, 1, 74, "No space", None)
    (tmp_path / "exit.rank2").write_text("{")
    first, second = runstate.read_failures(exit_file)
    assert (first["rank"], first["step"], second["rank"], second["code"]) == (3, 7, 1, 74)
    assert len(first["error"]) <= 4000 and first["host"]


def test_the_first_failure_counts(tmp_path: Path) -> None:
    for code in ("74", "1"):
        runstate.first_writer(tmp_path / "code", code)
    assert (tmp_path / "code").read_text() == "74"


def test_storage_errors_are_found_behind_others() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as full:
            raise RuntimeError("writer failed") from full
    except RuntimeError as error:
        assert runstate.is_storage_error(error)
    gathered = CheckpointException("write", {1: (OSError(errno.ENOSPC, "full"), None)})
    assert runstate.is_storage_error(gathered)
    assert runstate.is_storage_error(RuntimeError("[Errno 28] No space left on device"))
    assert not runstate.is_storage_error(OSError(errno.ENOENT, "no such file"))
    assert not runstate.is_storage_error(ValueError("x"))
