"""Continuing a run with other settings: what comes back, what is refused, what may change."""

from pathlib import Path

import pytest

from tests.e2e.runs import SMALL, Outcome, pretrain

pytestmark = pytest.mark.slow
WORDS = [*SMALL, "--num-attention-heads", "1", "--vocab-size", "256", "--train-iters", "4"]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Four steps of dense-0.12b's twin, with the baseline's own learning rate."""
    folder = tmp_path_factory.mktemp("baseline") / "run"
    outcome = pretrain(folder, "dense-0.12b", *WORDS, "--moa-mixing", "fixed")
    assert outcome.code == 0
    return outcome


def again(baseline: Outcome, *words: str) -> Outcome:
    command = ("dense-0.12b", *WORDS, "--moa-mixing", "fixed", *words)
    return pretrain(baseline.folder, *command, "--dry-run")


def test_the_rate_of_the_checkpoints_variant_comes_back(baseline: Outcome, tmp_path: Path) -> None:
    load = ("--load", str(baseline.folder / "checkpoints"), "--use-checkpoint-args")
    found = pretrain(tmp_path / "new", "dense-0.12b", *WORDS, *load, "--dry-run")
    assert found.code == 0 and "fixed activation (baseline)" in found.output
    assert "peak lr 0.002" in found.output


def test_another_rate_is_refused(baseline: Outcome) -> None:
    refused = again(baseline, "--lr", "1e-3")
    assert refused.code == 78 and "--finetune" in refused.output
    assert "lr: checkpoint 0.002, this run 0.001; min_lr: checkpoint 0.0001" in refused.output


def test_another_length_is_refused_unless_told_whose_schedule_counts(baseline: Outcome) -> None:
    refused = again(baseline, "--train-iters", "8")
    assert refused.code == 78 and "--override-opt-param-scheduler" in refused.output
    assert "samples of the whole schedule: checkpoint 16, this run 32" in refused.output
    words = ("--moa-mixing", "fixed", "--train-iters", "8", "--override-opt-param-scheduler")
    longer = pretrain(baseline.folder, "dense-0.12b", *WORDS, *words)
    assert longer.code == 0 and longer.status["step"] == 8
