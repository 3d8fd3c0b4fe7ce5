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
    with pytest.raises(ValueError, match="its save did not complete"):
        runstate.checkpoint_step(tmp_path)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("4\n")
    assert runstate.checkpoint_step(tmp_path) == 4
    tracker.write_text("")
    with pytest.raises(ValueError, match="instead of a step"):
        runstate.checkpoint_step(tmp_path)


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
