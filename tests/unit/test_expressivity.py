"""Theorems 4.1 and 4.2 in numbers: the larger class is exact, the smaller stays above its bound."""

import math
from pathlib import Path

import pytest
import torch

from moa_megatron.reference import ffn
from tools import show_expressivity as show

RATE = 2.0
STEPS, SEEDS = 60, 2
SLACK = 1e-6


@pytest.mark.parametrize(
    "net",
    show.representers(RATE),
    ids=lambda net: f"{net.config.variant}-{net.config.mixing}-{net.target.text}",
)
def test_representer_is_exact(net: show.Representer) -> None:
    assert show.exact_error(net) < 1e-10
    assert len(net.w_in) == 1 + net.config.gated, "width 1"


@pytest.mark.parametrize(
    "target",
    [show.relu_sum(), show.tanh_relu(RATE), show.quadratic_la(), show.quadratic_moa(RATE)],
    ids=lambda target: target.text,
)
def test_gradient_of_each_target_is_autograds(target: show.Target) -> None:
    x = show.points(target, 20).requires_grad_()
    (expected,) = torch.autograd.grad(target.value(x).sum(), x)
    assert torch.allclose(target.gradient(x.detach()), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", show.TYPE1)
def test_fixed_activations_stay_above_their_bound(name: str) -> None:
    best, _ = show.best_by_width((name,), show.relu_sum(), STEPS, SEEDS)
    for width, error in best.items():
        print(f"fixed {name}, width {width}: {error:.4f}, bound {1 / (width + 1):.4f}")
        assert error >= 1 / (width + 1) - SLACK


def test_la_stays_above_its_bound_at_every_width() -> None:
    best, _ = show.best_by_width(show.TYPE1, show.tanh_relu(RATE), STEPS, SEEDS)
    for width, error in best.items():
        print(f"LA, width {width}: {error:.4f}, bound {math.tanh(RATE) / 2:.4f}")
        assert error >= math.tanh(RATE) / 2 - SLACK


@pytest.mark.parametrize("width", [2, 4, 8, 50])
def test_bound_has_the_right_order(width: int) -> None:
    """A ReLU net with hinges at i/m reaches 1/m: between the bound and what training finds."""
    assert 1 / (width + 1) <= show.staircase_error(width) <= 1 / width + SLACK


def test_measure_reaches_zero_where_the_class_suffices() -> None:
    """Otherwise staying above a bound would say nothing: the learned sum, in the same harness."""
    nets = show.fresh_nets(("relu", "relu2"), [1, 1], dims=1, seed=0)
    nets.w, nets.a = torch.tensor([[[1.0, 0.0]]] * 2).double(), torch.ones(2, 1).double()
    nets.alpha[1, 1] = 0.0  # the second net is the fixed ReLU
    exact, fixed = show.sobolev_errors(nets, show.relu_sum(), 2001).tolist()
    assert exact < 1e-12
    assert fixed == pytest.approx(2.0)


@pytest.mark.parametrize("dims", [1, 2])
def test_trained_networks_are_the_references(dims: int) -> None:
    nets = show.fresh_nets(show.TYPE1, [3], dims, seed=1)
    config = show.MoAConfig(mixing="la", variant="type1")
    nets.alpha = torch.randn(
        1, len(show.TYPE1), generator=torch.Generator().manual_seed(0)
    ).double()
    target = show.relu_sum() if dims == 1 else show.tanh_relu(RATE)
    x = show.points(target, 12).requires_grad_()
    value = ffn(show.augment(x), nets.w[0], nets.a, nets.alpha[0], config).squeeze(-1)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    actual, slope = nets.evaluate(x.detach())
    assert torch.allclose(actual[0], value, rtol=0, atol=1e-12)
    assert torch.allclose(slope[0], gradient, rtol=0, atol=1e-12)


def test_command_prints_a_table_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "bounds.png"
    assert show.main(["--steps", "10", "--seeds", "1", "--out", str(picture)]) == 0
    printed = capsys.readouterr().out
    for words in ("EXACT", "TRAINED", "lower bound 1/(m+1)", "all bounds and constructions hold"):
        assert words in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_contradiction_would_be_reported() -> None:
    nets = show.fresh_nets(("relu",), [1], dims=2, seed=0)
    too_good = dict.fromkeys(show.WIDTHS, 0.01)
    representer = show.representers(RATE)[0]
    found = show.Findings([(representer, 1e-3, 0.0)], {"relu": too_good}, too_good, nets, RATE)
    assert len(show.violations(found)) == 1 + 2 * len(show.WIDTHS)


@pytest.mark.parametrize(
    "flags", [["--lambda", "0"], ["--seeds", "0"], ["--steps", "x"], ["--out", "/none/such/a.png"]]
)
def test_bad_arguments_leave_with_78(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        show.parse_arguments(flags)
    assert left.value.code == show.EXIT_INPUT
    assert flags[0] in capsys.readouterr().err
