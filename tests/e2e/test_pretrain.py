"""The main job end to end: what a user sees, exit codes, resume, and checkpoints as arguments."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from moa_megatron import runstate
from tests.e2e.runs import SMALL, SMALL_MOE, Outcome, environment, local, pretrain


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return pretrain(tmp_path_factory.mktemp("run") / "whole", "tiny-moe", *SMALL_MOE)


def test_a_finished_run_says_where_everything_is(finished: Outcome) -> None:
    assert finished.code == 0
    for text in (
        "HybridModel, 2 blocks, width 32, 8 experts top-2",
        "of them gates",
        "tokens/s",
        "finished at step 6 of 6",
        "validation loss",
    ):
        assert text in finished.output, text
    status = finished.status
    assert (status["state"], status["exit_code"], status["step"]) == ("finished", 0, 6)
    assert Path(status["checkpoint"]).is_dir() and Path(status["curves"]).stat().st_size > 5000
    assert 0 < status["validation_loss"] < 20
    assert list(Path(status["tensorboard"]).glob("events*"))
    log = (finished.folder / "logs" / "rank0.log").read_text()
    assert "moa_variant" in log, "Megatron's dump of all arguments belongs to the log file"
    assert "moa_variant" not in finished.output, "and not to the terminal"


def tensors(run: Outcome) -> dict[str, torch.Tensor]:
    whole = run.folder / "whole.pt"
    dcp_to_torch_save(run.status["checkpoint"], whole)
    state = torch.load(whole, weights_only=False)
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def test_stop_and_resume_equals_the_run_that_never_stopped(
    finished: Outcome, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    stopped = pretrain(folder, "tiny-moe", *SMALL_MOE, "--exit-interval", "3")
    assert stopped.code == 75 and stopped.status["state"] == "stopped"
    assert "continues from the checkpoint" in stopped.output
    resumed = pretrain(folder, "tiny-moe", *SMALL_MOE)
    assert resumed.code == 0 and "continues from" in resumed.output
    assert resumed.status["step"] == 6
    ours, theirs = tensors(resumed), tensors(finished)
    assert ours.keys() == theirs.keys() and any("exp_avg" in key for key in ours)
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different
    assert resumed.status["validation_loss"] == finished.status["validation_loss"]


@pytest.mark.slow
def test_repeating_the_command_does_not_start_again(finished: Outcome, tmp_path: Path) -> None:
    words = ["tiny-moe", *SMALL_MOE, "--load", str(finished.folder / "checkpoints"), "--finetune"]
    folder = tmp_path / "tuned"
    assert pretrain(folder, *words, "--exit-interval", "3").code == 75
    again = pretrain(folder, *words)
    assert again.code == 0 and again.status["step"] == 6
    assert "--finetune, --load only starts a run" in again.output


@pytest.mark.slow
def test_termination_saves_and_asks_for_a_retry(tmp_path: Path) -> None:
    words = ["tiny-moe", *SMALL_MOE, "--train-iters", "2000", "--expert-model-parallel-size", "2"]
    stopped = local(tmp_path / "run", *words, stop_after="iteration        2/", NPROC="2")
    assert stopped.code == 75 and stopped.status["state"] == "stopped"
    assert Path(stopped.status["checkpoint"]).name == f"iter_{stopped.status['step']:07d}"


@pytest.mark.slow
def test_a_failing_rank_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["tiny-moe", *SMALL_MOE, "--train-iters", "4", "--expert-model-parallel-size", "2"]
    (folder / "checkpoints").mkdir(parents=True)
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.write_text("garbage")
    failed = local(folder, *words, "--load", "/nowhere", NPROC="2")
    assert failed.code == 78 and "no iter_ folder beside it is complete" in failed.output
    tracker.unlink()
    (folder / "tensorboard").write_text("a file where a folder must go")
    failed = local(folder, *words, NPROC="2")
    assert failed.code == 1 and failed.status["state"] == "failed"
    assert failed.status["rank"] == 1, "TensorBoard is written by the last rank"
    assert "FileExistsError" in failed.status["error"] or "exists" in failed.status["error"]


def test_checkpoint_of_another_architecture(finished: Outcome, tmp_path: Path) -> None:
    checkpoints = str(finished.folder / "checkpoints")
    refused = pretrain(
        tmp_path / "other", "tiny-moe", *SMALL_MOE, "--load", checkpoints, "--moa-variant", "qd"
    )
    assert refused.code == 78 and not (tmp_path / "other").exists()
    assert "moa_variant: checkpoint bi, this run qd" in refused.output
    assert "dictionary: checkpoint ['gelu'" in refused.output
    assert "Traceback" not in refused.output


@pytest.mark.slow
def test_other_data_is_refused_unless_accepted(finished: Outcome, tmp_path: Path) -> None:
    load = [*SMALL_MOE, "--load", str(finished.folder / "checkpoints"), "--seed", "7", "--dry-run"]
    refused = pretrain(tmp_path / "other", "tiny-moe", *load)
    assert refused.code == 78 and "seed: checkpoint 1234, this run 7" in refused.output
    accepted = pretrain(tmp_path / "other", "tiny-moe", *load, "--accept-data-change")
    assert accepted.code == 0 and "as accepted: seed: checkpoint 1234" in accepted.output


def test_settings_come_back_from_the_checkpoint(finished: Outcome, tmp_path: Path) -> None:
    load = ["--load", str(finished.folder / "checkpoints"), "--use-checkpoint-args", "--mock-data"]
    load += ["--use-checkpoint-opt-param-scheduler"]
    again = pretrain(tmp_path / "again", "tiny-dense", *load, "--dry-run")
    assert again.code == 0, "the recipe is dense, the checkpoint is not"
    assert "HybridModel, 2 blocks, width 32, 8 experts top-2" in again.output
    clash = pretrain(tmp_path / "clash", "tiny-moe", *load, "--moa-variant", "one", "--dry-run")
    assert clash.code == 78
    assert "moa_variant: checkpoint 'bi', command line 'one'" in clash.output


@pytest.mark.slow
def test_two_processes_through_the_launcher(tmp_path: Path) -> None:
    words = ["tiny-moe", *SMALL_MOE, "--train-iters", "2", "--expert-model-parallel-size", "2"]
    done = local(tmp_path / "two", *words, NPROC="2")
    assert done.code == 0 and "EP 2 x DP 2" in done.output
    assert done.status["state"] == "finished"
    refused = local(tmp_path / "three", *words, "--moe-router-topk", "9", NPROC="2")
    assert refused.code == 78 and not (tmp_path / "three").exists()
    assert refused.output.count("refused:") == 1 and "Traceback" not in refused.output


def test_refusals_before_megatron_is_even_imported(tmp_path: Path) -> None:
    for words, message in (
        (["tiny-mo"], "did you mean 'tiny-moe'?"),
        (["tiny-moe", "--set", "x"], "write it as key=value"),
    ):
        refused = local(tmp_path / "none", *words)
        assert refused.code == 78 and message in refused.output
        assert "Traceback" not in refused.output and not (tmp_path / "none").exists()


def refuse(folder: Path, rank: int, world: int) -> int:
    command = [sys.executable, "-m", "moa_megatron.pretrain", "tiny-mo", "--run-dir", str(folder)]
    env = environment(RANK=str(rank), WORLD_SIZE=str(world))
    return subprocess.run([*command, "--exit-file", str(folder / "exit")], env=env).returncode


def test_a_refusal_by_all_ranks_leaves_the_launcher_quiet(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda rank: refuse(tmp_path, rank, 2), range(2)))
    assert codes == [0, 0] and (tmp_path / "exit").read_text() == "78"


@pytest.mark.slow
def test_a_refusal_by_one_rank_ends_the_others(tmp_path: Path) -> None:
    """A node without the data, say: its ranks must fail, or the others would wait for them."""
    assert refuse(tmp_path, 1, 2) == 78
    account = runstate.read_failures(tmp_path / "exit")[0]
    assert account["rank"] == 1 and "did you mean 'tiny-moe'" in account["error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("tiny-moe", "--moa-variant", "qd"),
        ("tiny-moe", "--moa-mixing", "la"),
        ("tiny-moe", "--moa-mixing", "fixed"),
        ("tiny-moe", "--moa-variant", "type1", "--moa-gate-scope", "expert"),
        ("tiny-moe", "--moa-model", "gpt", "--mtp-num-layers", "1"),
        ("tiny-dense", "--moa-variant", "one", "--bf16", "--optimizer", "muon"),
        ("tiny-moe", "--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
    ],
    ids=lambda words: "-".join(words).replace("--", ""),
)
def test_every_kind_of_run_finishes(words: tuple[str, ...], tmp_path: Path) -> None:
    small = SMALL_MOE if "tiny-moe" in words else SMALL
    done = pretrain(tmp_path / "run", words[0], *small, "--train-iters", "2", *words[1:])
    assert done.code == 0 and done.status["state"] == "finished"
