"""Settings of the optimiser against those of a checkpoint."""

from types import SimpleNamespace
from typing import Any

import pytest

from moa_megatron import checkpoints


def settings(**values: Any) -> Any:
    common: dict[str, Any] = {
        "finetune": False, "no_load_optim": False, "skip_train": False, "load": "runs/old",
        "lr": 1e-3, "min_lr": 0.0, "optimizer": "muon", "muon_split_qkv": True,
        "moa_muon_split_fc1": True, "override_opt_param_scheduler": False,
        "use_checkpoint_opt_param_scheduler": False, "global_batch_size": 4, "train_iters": 10,
        "train_samples": None, "lr_decay_iters": None, "lr_decay_samples": None,
        "lr_warmup_iters": 2, "lr_warmup_samples": 0, "lr_warmup_fraction": None,
        "lr_decay_style": "WSD", "start_weight_decay": 0.1, "end_weight_decay": 0.1,
    }  # fmt: skip
    return SimpleNamespace(**{**common, **values})


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({}, {}, []),
        # Megatron fills in the decay once it has begun.
        ({"lr_decay_iters": 10}, {}, []),
        ({"lr_warmup_fraction": 0.2, "lr_warmup_iters": 0}, {}, []),
        ({"global_batch_size": 8, "train_iters": 5, "lr_warmup_iters": 1}, {}, []),
        ({}, {"lr": 2e-3}, ["lr: checkpoint 0.001, this run 0.002", "--finetune"]),
        ({}, {"train_iters": 20}, ["schedule: checkpoint 40, this run 80", "--override-opt-param"]),
        ({}, {"lr_warmup_iters": 3}, ["warm-up: checkpoint 8, this run 12"]),
        ({}, {"lr_decay_style": "cosine"}, ["lr_decay_style: checkpoint WSD"]),
        ({}, {"train_iters": 20, "override_opt_param_scheduler": True}, []),
        ({}, {"train_iters": 20, "use_checkpoint_opt_param_scheduler": True}, []),
        ({}, {"lr": 2e-3, "finetune": True}, []),
        ({}, {"lr": 2e-3, "no_load_optim": True}, []),
        (
            {"moa_muon_split_fc1": False},
            {},
            ["moa_muon_split_fc1: checkpoint False, this run True"],
        ),
        ({"moa_muon_split_fc1": False, "optimizer": "adam"}, {}, []),
    ],
)
def test_differences(old: dict[str, Any], new: dict[str, Any], words: list[str]) -> None:
    problems = checkpoints.optimizer_problems(settings(**new), settings(**old))
    assert len(problems) == bool(words)
    assert all(word in problems[0] for word in words)


def test_checkpoints_of_versions_before_the_split() -> None:
    saved = settings()
    del saved.moa_muon_split_fc1
    (problem,) = checkpoints.optimizer_problems(settings(), saved)
    assert "moa_muon_split_fc1: checkpoint False" in problem
