"""The schedule and the optimiser of every recipe, as Megatron's own scheduler computes them."""

import math
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers import isolated

# Peak learning rates of method.md, section 5; baseline first, then one, bi, qd.
PEAKS = {
    "dense-0.12b": (2e-3, 3e-3, 3e-3, 3e-3),
    "dense-0.12b-long": (4e-3, 5e-3, 6e-3, 5e-3),
    "dense-0.25b": (2e-3,) * 4,
    "dense-0.5b": (2e-3,) * 4,
    "moe-0.25b": (2e-3,) * 4,
    "moe-0.5b": (1e-3,) * 4,
    "moe-0.8b": (1e-3,) * 4,
    "moe-1b": (1e-3,) * 4,
    "moe-2b": (6e-4,) * 4,
}
STEPS = {
    "dense-0.12b": (5_000, 500),
    "dense-0.12b-long": (20_000, 1_000),
    "dense-0.25b": (10_000, 1_000),
    "dense-0.5b": (18_400, 1_000),
    "moe-0.25b": (20_000, 1_000),
    "moe-0.5b": (40_000, 1_000),
    "moe-0.8b": (60_000, 1_000),
    "moe-1b": (80_000, 1_000),
    "moe-2b": (120_000, 2_000),
}


def prepared(recipe: str, *words: str) -> Any:
    from moa_megatron import host

    host.install()
    from moa_megatron import launch, patches, recipes

    patches.apply()
    argv = [recipe, "--run-dir", "runs/never-made", "--mock-data", *words]
    return launch.prepare(recipes.parse_command_line(argv), host.HOST_ARGS)


def rates(args: Any, *steps: float) -> list[float]:
    """Learning rates that Megatron's scheduler sets at these steps."""
    from unittest import mock

    from megatron.training import training

    group = {"lr": 0.0, "weight_decay": 0.0}
    optimizer = SimpleNamespace(param_groups=[group])
    with mock.patch.object(training, "get_args", lambda: args):
        scheduler = training.get_optimizer_param_scheduler(optimizer)
    found = []
    for step in steps:
        scheduler.num_steps = 0
        scheduler.step(increment=round(step * args.global_batch_size))
        found.append(group["lr"])
        assert group["weight_decay"] == 0.1
    return found


def check_rates_of_every_recipe_and_variant() -> None:
    for recipe, peaks in PEAKS.items():
        total, warmup = STEPS[recipe]
        choices = (("--moa-mixing", "fixed"), *(("--moa-variant", v) for v in ("one", "bi", "qd")))
        for words, peak in zip(choices, peaks):
            args = prepared(recipe, *words).args
            assert args.train_iters == total, recipe
            half, top, at_80, after, end = rates(
                args, warmup / 2, warmup, 0.8 * total, 0.9 * total, total
            )
            assert math.isclose(half, peak / 2) and math.isclose(top, peak), (recipe, words)
            if "moe" in recipe:
                assert math.isclose(at_80, peak) and math.isclose(after, peak / 2), recipe
                assert end == 0.0, recipe
            else:
                floor, share = peak / 20, (0.8 * total - warmup) / (total - warmup)
                cosine = floor + (peak - floor) * (1 + math.cos(math.pi * share)) / 2
                assert math.isclose(at_80, cosine, rel_tol=1e-6), recipe
                assert math.isclose(end, floor), recipe


def check_settings_of_the_paper() -> None:
    for recipe in PEAKS:
        args = prepared(recipe).args
        values = (args.seq_length, args.global_batch_size, args.eval_interval, args.clip_grad)
        assert values == (1024, 512, 200, 1.0), recipe
        adam = (args.adam_beta1, args.adam_beta2, args.adam_eps, args.weight_decay)
        assert adam == (0.9, 0.95, 1e-8, 0.1), recipe
        assert args.padded_vocab_size == 50304 and args.init_method_std == 0.02, recipe
        assert args.optimizer == ("muon" if "moe" in recipe else "adam"), recipe
        if args.optimizer == "muon":
            muon = (args.muon_momentum, args.muon_nesterov, args.muon_num_ns_steps)
            assert muon == (0.95, True, 5), recipe
            scale = (args.muon_scale_mode, args.muon_extra_scale_factor, args.muon_tp_mode)
            assert scale == ("spectral", 0.2, "duplicated"), recipe


def check_the_floor_follows_a_chosen_peak() -> None:
    args = prepared("dense-0.12b", "--lr", "1e-3").args
    assert math.isclose(args.min_lr, 5e-5)
    assert prepared("dense-0.12b", "--lr", "1e-3", "--min-lr", "1e-6").args.min_lr == 1e-6


def check_floors_are_round_numbers() -> None:
    """Checkpoints know groups of parameters by them: 0.05 * 3e-3 is not 1.5e-4."""
    assert prepared("dense-0.12b").args.min_lr == 1.5e-4


def check_runs_counted_in_samples() -> None:
    run = prepared("dense-0.12b", "--train-samples", "51200", "--lr-warmup-samples", "1000")
    assert any("51200 samples, 52.4M tokens" in line for line in run.summary())


def check_a_warm_up_of_ones_own() -> None:
    for words in (("--tokens", "1B"), ("--train-iters", "1000")):
        args = prepared("dense-0.12b", *words, "--lr-warmup-fraction", "0.01").args
        assert (args.lr_warmup_fraction, args.lr_warmup_iters) == (0.01, 0)


def check_budgets_scale_the_schedule() -> None:
    args = prepared("moe-2b", "--tokens", "20x").args
    steps = math.ceil(20 * 1_996_574_720 / (512 * 1024))
    assert (
        args.train_iters == steps == prepared("moe-2b", "--tokens", "39931494400").args.train_iters
    )
    fixed = prepared("moe-2b", "--tokens", "20x", "--moa-mixing", "fixed").args
    assert fixed.train_iters == steps, "baseline and mixture train equally long"
    assert rates(args, steps) == [0.0]
    top, at_80 = rates(args, args.lr_warmup_iters, 0.79 * steps)
    assert math.isclose(top, 6e-4) and math.isclose(at_80, 6e-4)
    short = prepared("moe-2b", "--train-iters", "20").args
    assert (short.lr_warmup_iters, short.lr_wsd_decay_iters) == (1, 4)


def check_commands_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    lines = page.split("```bash\n")[1].split("```")[0].splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    assert [command[0] for command in commands] == ["./launch/local.sh"] * 2
    lengths = [prepared(*command[1:]).args.train_iters for command in commands]
    assert lengths == [math.ceil(20 * 119_744_256 / 524_288), math.ceil(10e9 / 524_288)]


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_schedules(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
