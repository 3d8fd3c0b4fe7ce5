"""Token budgets, and schedules that keep the recipe's proportions."""

import argparse
from typing import Any

import pytest

from moa_megatron import budget, outline, recipes
from moa_megatron.recipes import RefusedError

WSD = {"train_iters": 1000, "lr_warmup_iters": 50, "lr_wsd_decay_iters": 200}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("2.6B", 2_600_000_000), ("300m", 300_000_000), ("5000", 5000), ("20x", 2000), ("1T", 10**12)],
)
def test_budgets(text: str, tokens: int) -> None:
    assert budget.tokens(text, parameters=100) == tokens


@pytest.mark.parametrize("text", ["", "x", "20 x", "-3B", "0B", "2.6G", "1e9", "20xx"])
def test_malformed_budgets_name_the_value_and_the_form(text: str) -> None:
    with pytest.raises(RefusedError, match="such as 2.6B or 300M, or .* such as 20x") as refused:
        budget.tokens(text, 100)
    assert f"--tokens {text}:" in str(refused.value)


def test_tokens_per_parameter_need_the_parameters() -> None:
    with pytest.raises(RefusedError, match="give --vocab-size"):
        budget.tokens("20x", None)


@pytest.mark.parametrize(
    ("number", "words"), [(999, "999"), (153_600, "154K"), (2.62144e9, "2.62B"), (4e12, "4T")]
)
def test_numbers_are_shown_as_they_are_given(number: float, words: str) -> None:
    assert budget.short(number) == words
    assert budget.tokens(words, None) == pytest.approx(number, rel=5e-3)


def test_steps_see_at_least_the_budget() -> None:
    assert budget.steps("1000", None, 100) == 10
    assert budget.steps("1001", None, 100) == 11
    assert budget.steps("1", None, 100) == 1


def test_schedules_scale_unless_set() -> None:
    assert budget.scaled(WSD, 100, ()) == {"lr_warmup_iters": 5, "lr_wsd_decay_iters": 20}
    assert budget.scaled(WSD, 100, ("lr_warmup_iters",)) == {"lr_wsd_decay_iters": 20}
    assert budget.scaled(WSD, 3, ()) == {"lr_warmup_iters": 1, "lr_wsd_decay_iters": 1}
    assert "lr_warmup_iters" not in budget.scaled({**WSD, "lr_warmup_iters": 0}, 100, ())
    assert budget.scaled(WSD, 1, ()) == {"lr_warmup_iters": 0, "lr_wsd_decay_iters": 1}
    for other in ("lr_warmup_fraction", "lr_warmup_samples"):
        assert "lr_warmup_iters" not in budget.scaled(WSD, 100, {other})
    assert budget.scaled(WSD, 1000, ()) == budget.scaled({"lr_warmup_iters": 5}, 10, ()) == {}


def namespace(**values: Any) -> argparse.Namespace:
    common = {"tokens": None, "global_batch_size": 4, "seq_length": 25, **WSD}
    return argparse.Namespace(**{**common, **values})


def test_a_budget_sets_steps_and_schedule() -> None:
    args = namespace(tokens="10K")
    budget.apply(args, WSD, {"tokens"}, lambda: None)
    assert (args.train_iters, args.lr_warmup_iters, args.lr_wsd_decay_iters) == (100, 5, 20)


@pytest.mark.parametrize(
    ("values", "given", "named"),
    [
        ({}, {"train_iters"}, "--train-iters"),
        ({"train_samples": 5}, set(), "--train-samples"),
        ({"rampup_batch_size": ["1"]}, set(), "--rampup-batch-size"),
    ],
)
def test_one_length_of_the_run(values: dict[str, Any], given: set[str], named: str) -> None:
    with pytest.raises(RefusedError, match=f"with {named}: give one of them"):
        budget.apply(namespace(tokens="10K", **values), WSD, given, lambda: None)


def test_a_budget_needs_the_size_of_a_step() -> None:
    with pytest.raises(RefusedError, match=r"needs --global-batch-size \(None\)"):
        budget.apply(namespace(tokens="1B", global_batch_size=None), WSD, {"tokens"}, lambda: None)


def test_a_launcher_sees_the_same_schedule() -> None:
    """Else a login node would refuse a short run, whose warm-up is shorter too."""
    from moa_megatron import layout

    values = outline.outline("moe-2b", ["--train-iters", "20"])
    assert values["lr_warmup_iters"] == 1
    assert not layout.schedule_problems(argparse.Namespace(**values))
    long = outline.outline("moe-2b", ["--train-iters", "20", "--lr-warmup-iters", "30"])
    assert layout.schedule_problems(argparse.Namespace(**long))
    tokens = outline.outline("moe-2b", ["--tokens", "20x"])
    assert tokens["tokens"] == "20x" and not layout.schedule_problems(argparse.Namespace(**tokens))


@pytest.mark.parametrize(
    ("flags", "settings", "lr"),
    [
        ([], {}, 6e-3),
        (["--moa-variant", "qd"], {}, 5e-3),
        (["--moa-mixing=fixed"], {}, 4e-3),
        ([], {"moa_mixing": "fixed"}, 4e-3),
        ([], {"moa-variant": "one"}, 5e-3),
        (["--moa-mixing", "la", "--moa-variant", "bi"], {}, 4e-3),
    ],
)
def test_learning_rates_follow_the_variant(
    flags: list[str], settings: dict[str, Any], lr: float
) -> None:
    values = recipes.of_variant(recipes.load("dense-0.12b-long"), settings, flags)
    assert float(values["lr"]) == lr and "variants" not in values


def test_what_a_recipe_states_itself_holds_for_all_its_variants(tmp_path: Any) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("inherits: dense-0.12b-long\nlr: 1.0e-3\n")
    for flags in ([], ["--moa-mixing", "fixed"]):
        assert float(recipes.of_variant(recipes.load(str(child)), {}, flags)["lr"]) == 1e-3


def test_variants_of_a_child_join_those_of_its_parent(tmp_path: Any) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("inherits: dense-0.12b-long\nvariants: {bi: {lr: 1.0e-3}}\n")
    found = recipes.load(str(child))
    for flags, lr in (([], 1e-3), (["--moa-variant", "qd"], 5e-3), (["--moa-mixing=la"], 4e-3)):
        assert float(recipes.of_variant(found, {}, flags)["lr"]) == lr
    assert recipes.load("dense-0.12b-long")["variants"]["bi"]["lr"] == 6e-3, "loaded anew"


@pytest.mark.parametrize("text", ["{two: {lr: 1}}", "", "{bi: }", "[bi]"])
def test_malformed_variants_are_refused(text: str, tmp_path: Any) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"inherits: dense-0.12b\nvariants: {text}\n")
    with pytest.raises(RefusedError, match=r"bad.yaml: variants must map fixed, la, type1"):
        recipes.load(str(path))
