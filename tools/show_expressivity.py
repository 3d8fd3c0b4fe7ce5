#!/usr/bin/env python3
"""Show what learned and token-adaptive activations represent and fixed ones cannot.

Two kinds of evidence, kept apart. EXACT rows build a network by hand and evaluate it with
moa_megatron.reference.ffn in float64. TRAINED rows fit the smaller class by gradient descent: they
illustrate a lower bound (method paper, theorems 4.1 and 4.2), whose proof is not by training.
Domain [-1, 1]^d, which the theorem leaves open: the bounds need both sides of the kinks.
Norm W^{1,inf}: the larger of the greatest error in value and in any partial derivative.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from moa_megatron.activations import ACTIVATIONS
from moa_megatron.config import MoAConfig
from moa_megatron.reference import ffn, fixed_ffn

EXIT_STORAGE, EXIT_INPUT = 74, 78
# One-sided derivatives are taken this far from a kink: far above float64's resolution on [-1, 1],
# far below what a trained network can turn around in.
NUDGE = 1e-9
WIDTHS = (1, 2, 4, 8)
TYPE1 = MoAConfig(variant="type1").names
EXAMPLES = """examples:
  tools/show_expressivity.py --quick
  tools/show_expressivity.py --lambda 3 --seeds 12 --out expressivity.png
"""


@dataclass(frozen=True)
class Target:
    """A function of x [T, d], its gradient [T, d], and its points of evaluation."""

    text: str
    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    dims: int


@dataclass(frozen=True)
class Representer:
    """An LA or MoA network on the augmented input (x, 1), its weights written by hand."""

    target: Target
    config: MoAConfig
    w_in: list[list[float]]
    w_out: float
    coefficients: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return ffn(
            augment(x), _row(*self.w_in), _row([self.w_out]), self.coefficients, self.config
        ).squeeze(-1)


def _row(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def augment(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def step(x: Tensor) -> Tensor:
    return (x > 0).double()


def relu_sum() -> Target:
    """Theorem 4.1: in LA, not in any fixed class.

    Any fixed net of width m errs by 1/(m+1) or more on [-1, 1]: f' = step(x) (1 + 2x). If sigma is
    C1 (gelu, silu, relu2), the jump of 1 at 0 costs 1/2. If it is piecewise linear (relu,
    leaky_relu), g' is constant on m+1 intervals, one of which covers a length of 1/(m+1) or more of
    [0, 1], where f' varies by twice that.
    """
    return Target(
        "ReLU(x1) + ReLU^2(x1)",
        lambda x: torch.relu(x[:, 0]) + torch.relu(x[:, 0]).square(),
        lambda x: step(x) * (1 + 2 * x),
        1,
    )


def tanh_relu(rate: float) -> Target:
    """Theorem 4.1: in MoA, not in LA at any width.

    On [-1, 1]^2 the jump of df/dx2 across x2 = 0 is tanh(rate x1). A sum of ridge functions jumps
    there by a constant (kinks elsewhere cross that line in points), so at x1 = -1 or x1 = 1 the
    jumps differ by tanh(rate) or more, and one of the two sides errs by half of it.
    """
    return Target(
        f"tanh({rate:g} x1) ReLU(x2)",
        lambda x: torch.tanh(rate * x[:, 0]) * torch.relu(x[:, 1]),
        lambda x: torch.stack(
            [
                rate / torch.cosh(rate * x[:, 0]).square() * torch.relu(x[:, 1]),
                torch.tanh(rate * x[:, 0]) * step(x[:, 1]),
            ],
            dim=1,
        ),
        2,
    )


def quadratic_la() -> Target:
    """Theorem 4.2: in Type-II quadratic LA."""
    return Target(
        "ReLU(x2) (ReLU(x1) + tanh(x1))",
        lambda x: torch.relu(x[:, 1]) * (torch.relu(x[:, 0]) + torch.tanh(x[:, 0])),
        lambda x: torch.stack(
            [
                torch.relu(x[:, 1]) * (step(x[:, 0]) + 1 / torch.cosh(x[:, 0]).square()),
                step(x[:, 1]) * (torch.relu(x[:, 0]) + torch.tanh(x[:, 0])),
            ],
            dim=1,
        ),
        2,
    )


def quadratic_moa(rate: float) -> Target:
    """Theorem 4.2: in Type-II quadratic MoA."""

    def gradient(x: Tensor) -> Tensor:
        ramp, gate = torch.relu(x), torch.tanh(rate * x[:, 0])
        inner = step(x[:, 0]) * gate + ramp[:, 0] * rate / torch.cosh(rate * x[:, 0]).square()
        return torch.stack([ramp[:, 1] * inner, step(x[:, 1]) * ramp[:, 0] * gate], dim=1)

    return Target(
        f"ReLU(x2) ReLU(x1) tanh({rate:g} x1)",
        lambda x: torch.relu(x).prod(dim=1) * torch.tanh(rate * x[:, 0]),
        gradient,
        2,
    )


def representers(rate: float) -> list[Representer]:
    """Every exact construction; a tanh gate of 1/2 and an output weight of 2 make a plain LA."""
    half = math.atanh(0.5)

    def la(variant: Any, dictionary: tuple[str, ...]) -> MoAConfig:
        return MoAConfig(mixing="la", variant=variant, dictionary=dictionary)

    def moa(variant: Any, dictionary: tuple[str, ...]) -> MoAConfig:
        return MoAConfig(variant=variant, gate="tanh", dictionary=dictionary)

    x1, x2 = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    both = ("relu", "relu2")
    pair = ("relu", "tanh")
    swap, constant = [x2, x1], [[0.0, 0.0, half], [0.0, 0.0, half], [0.0] * 3]
    varying = [[rate, 0.0, 0.0], [0.0] * 3, [0.0] * 3]
    ones = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    return [
        Representer(relu_sum(), la("type1", both), [[1.0, 0.0]], 1.0, ones[:2]),
        Representer(
            relu_sum(), moa("type1", both), [[1.0, 0.0]], 2.0, _row([0.0, half], [0.0, half])
        ),
        Representer(tanh_relu(rate), moa("type1", both), [x2], 1.0, _row(*varying[:2])),
        # pairs (relu, relu), (relu, tanh), (tanh, tanh) with y = x2 and z = x1
        Representer(quadratic_la(), la("qd", pair), swap, 1.0, ones),
        Representer(quadratic_la(), moa("qd", pair), swap, 2.0, _row(*constant)),
        Representer(quadratic_moa(rate), moa("qd", pair), swap, 1.0, _row(*varying)),
    ]


def points(target: Target, per_axis: int) -> Tensor:
    """A grid of [-1, 1]^d with both corners, both sides of 0, and not 0 itself."""
    axis = torch.linspace(-1, 1, per_axis - per_axis % 2, dtype=torch.float64)
    axis = torch.cat([axis, torch.tensor([-NUDGE, NUDGE], dtype=torch.float64)]).sort().values
    return torch.cartesian_prod(*[axis] * target.dims).reshape(-1, target.dims)


def exact_error(net: Representer, per_axis: int = 101) -> float:
    """W^{1,inf} on a grid, derivatives by autograd through the reference."""
    x = points(net.target, per_axis).requires_grad_()
    value = net(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    with torch.no_grad():
        off = (value - net.target.value(x)).abs().max()
        return max(off.item(), (gradient - net.target.gradient(x)).abs().max().item())


@dataclass
class Nets:
    """R small networks side by side: sum_m a_m sum_k alpha_k sigma_k(w_m . (x, 1))."""

    names: tuple[str, ...]
    widths: list[int]
    w: Tensor  # [R, M, d+1]
    a: Tensor  # [R, M], zero beyond the width
    alpha: Tensor  # [R, K]: trained for LA; one frozen entry of 1 for a fixed activation

    def parameters(self) -> list[Tensor]:
        learned = [self.w, self.a] + ([self.alpha] if len(self.names) > 1 else [])
        return [tensor.requires_grad_() for tensor in learned]

    def mask(self) -> Tensor:
        return (torch.arange(self.a.shape[1]) < torch.tensor(self.widths)[:, None]).double()

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values [R, T] and gradients [R, T, d] at x, [T, d] or [R, T, d]."""
        slope = MoAConfig().leaky_slope
        one = torch.ones_like(x[..., :1])
        pre = self.w @ torch.cat([x, one], dim=-1).transpose(-1, -2)  # [R, M, T]
        weights = self.alpha.T[:, :, None, None]
        rows = [ACTIVATIONS[name] for name in self.names]
        value = sum(c * row.function(pre, slope) for c, row in zip(weights, rows, strict=True))
        speed = sum(c * row.derivative(pre, slope) for c, row in zip(weights, rows, strict=True))
        a = self.a * self.mask()
        return (
            torch.einsum("rm,rmt->rt", a, torch.as_tensor(value)),
            torch.einsum("rm,rmt,rmd->rtd", a, torch.as_tensor(speed), self.w[..., :-1]),
        )


def fresh_nets(names: tuple[str, ...], widths: list[int], dims: int, seed: int) -> Nets:
    """Random directions of length about 1.5, hinges spread over the domain."""
    generator = torch.Generator().manual_seed(seed)
    count, most = len(widths), max(widths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w = 1.5 * normal(count, most, dims + 1) / math.sqrt(dims)
    w[..., -1] *= 0.5
    a = normal(count, most) / math.sqrt(most)
    alpha = torch.ones(count, len(names), dtype=torch.float64)
    return Nets(names, widths, w, a, alpha)


def errors(nets: Nets, target: Target, x: Tensor) -> Tensor:
    """Signed errors [R, T, 1 + d] in value and gradient."""
    value, gradient = nets.evaluate(x)
    flat = x.reshape(-1, target.dims)
    shape = value.shape if x.dim() == 3 else value.shape[1:]
    off = value - target.value(flat).view(shape)
    off_gradient = gradient - target.gradient(flat).view(*shape, target.dims)
    return torch.cat([off.unsqueeze(-1), off_gradient], dim=-1)


def train(nets: Nets, target: Target, steps: int, x: Tensor) -> None:
    """On the mean square of value and gradient errors first, then on their 8th power."""

    def loss(i: int) -> Tensor:
        power = 2 if i < steps // 2 else 8
        off = errors(nets, target, x).abs().flatten(1)
        # 1e-12 keeps the root differentiable where the error is zero
        return (off.pow(power).mean(dim=1) + 1e-12).pow(1 / power).sum()

    minimise(nets.parameters(), loss, steps)


@torch.no_grad()
def sobolev_errors(nets: Nets, target: Target, per_axis: int) -> Tensor:
    """Measured W^{1,inf} errors [R]: never above the true ones, for the grid is a subset.

    In one dimension the grid takes in both sides of every hinge, which makes it exact for piecewise
    linear nets: the target's derivative is monotone between hinges.
    """
    x = points(target, per_axis)
    if target.dims == 1:
        hinges = -nets.w[..., -1:] / nets.w[..., :1]
        near = torch.cat([hinges - NUDGE, hinges + NUDGE], dim=1)
        near = torch.where(near.abs() <= 1, near, torch.ones_like(near))
        x = torch.cat([x.expand(len(near), -1, -1), near], dim=1)
    return errors(nets, target, x).abs().flatten(1).amax(dim=1)


def best_by_width(
    names: tuple[str, ...], target: Target, steps: int, seeds: int, seed: int = 0
) -> tuple[dict[int, float], Nets]:
    """The least W^{1,inf} error found for each width, over `seeds` nets, and the nets."""
    widths = [width for width in WIDTHS for _ in range(seeds)]
    nets = fresh_nets(names, widths, target.dims, seed)
    train(nets, target, steps, points(target, 64 if target.dims == 1 else 14))
    found = sobolev_errors(nets, target, 2001 if target.dims == 1 else 81).tolist()
    return {
        width: min(e for e, other in zip(found, widths, strict=True) if other == width)
        for width in WIDTHS
    }, nets


def staircase_error(width: int) -> float:
    """Exact error of a hand-built ReLU net: hinges at i/m, slopes in the middle, so about 1/m."""
    hinges = torch.arange(width, dtype=torch.float64) / width
    slopes = 1 + (2 * torch.arange(width, dtype=torch.float64) + 1) / width
    w_in = torch.stack([torch.ones_like(hinges), -hinges], dim=1)
    w_out = torch.diff(slopes, prepend=torch.zeros(1).double())[None]
    target = relu_sum()
    sides = torch.cat([hinges - NUDGE, hinges + NUDGE, torch.ones(1).double()])[:, None]
    x = torch.cat([points(target, 2001), sides]).requires_grad_()
    value = fixed_ffn(augment(x), w_in, w_out, "relu", gated=False).squeeze(-1)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    off = (value - target.value(x)).abs().max().item()
    return max(off, (gradient - target.gradient(x)).abs().max().item())


def train_representer(net: Representer, steps: int, restarts: int = 64) -> float:
    """Best RMS error in value of the same class from random weights, all restarts side by side.

    Not W^{1,inf}: a hinge off by any amount costs half a jump there, however small the amount.
    """
    x = augment(points(net.target, 64 if net.target.dims == 1 else 14))
    wanted = net.target.value(x)
    generator = torch.Generator().manual_seed(0)
    free = [
        torch.randn(restarts, *shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in (_row(*net.w_in).shape, (1, 1), net.coefficients.shape)
    ]

    def mean_square(w_in: Tensor, w_out: Tensor, coefficients: Tensor) -> Tensor:
        return (ffn(x, w_in, w_out, coefficients, net.config)[:, 0] - wanted).square().mean()

    every = torch.func.vmap(mean_square)
    minimise(free, lambda _: every(*free).sum(), steps)
    return every(*free).min().sqrt().item()


def minimise(parameters: list[Tensor], loss: Callable[[int], Tensor], steps: int) -> None:
    optimiser = torch.optim.Adam(parameters, lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=1e-4)
    for i in range(steps):
        optimiser.zero_grad()
        loss(i).backward()
        optimiser.step()
        schedule.step()


@dataclass
class Findings:
    exact: list[tuple[Representer, float, float]]
    fixed: dict[str, dict[int, float]]
    la: dict[int, float]
    la_nets: Nets
    rate: float


def investigate(rate: float, steps: int, seeds: int) -> Findings:
    exact = [(net, exact_error(net), train_representer(net, steps)) for net in representers(rate)]
    fixed = {name: best_by_width((name,), relu_sum(), steps, seeds)[0] for name in TYPE1}
    la, nets = best_by_width(TYPE1, tanh_relu(rate), steps, seeds)
    return Findings(exact, fixed, la, nets, rate)


def report(found: Findings) -> str:
    lines = [
        "EXACT: networks of width 1 written by hand (W^{1,inf} error of reference.ffn, float64)"
    ]
    lines += [f"  {'function':34} {'class':14} {'by hand':>9}   trained, RMS in value (best seed)"]
    for net, error, rms in found.exact:
        label = f"{net.config.variant} {net.config.mixing}"
        lines.append(f"  {net.target.text:34} {label:14} {error:9.1e}   {rms:.1e}")
    lines += [
        "",
        f"TRAINED: fixed activations on {relu_sum().text}, best W^{{1,inf}} error by width",
    ]
    lines += [f"  {'width':22}" + "".join(f"{width:>9}" for width in WIDTHS)]
    lines += [_numbers("lower bound 1/(m+1)", [1 / (width + 1) for width in WIDTHS])]
    for name, by_width in found.fixed.items():
        lines.append(_numbers(name, list(by_width.values())))
    lines.append(_numbers("relu, hinges by hand", [staircase_error(width) for width in WIDTHS]))
    lines += ["", f"TRAINED: LA on {tanh_relu(found.rate).text}, best W^{{1,inf}} error by width"]
    lines.append(_numbers("lower bound tanh(l)/2", [math.tanh(found.rate) / 2] * len(WIDTHS)))
    lines.append(_numbers("LA, five activations", list(found.la.values())))
    return "\n".join(lines)


def _numbers(label: str, values: list[float]) -> str:
    return f"  {label:22}" + "".join(f"{value:9.4f}" for value in values)


def violations(found: Findings) -> list[str]:
    """Where a measurement contradicts the theorem or a construction is not exact."""
    slack, limit = 1e-6, 1e-10
    wrong = [
        f"{net.target.text} by {net.config.mixing} errs by {error:.1e}"
        for net, error, _ in found.exact
        if error > limit
    ]
    for name, width in itertools.product(found.fixed, WIDTHS):
        if found.fixed[name][width] < 1 / (width + 1) - slack:
            wrong.append(f"{name} of width {width} is below 1/(m+1): {found.fixed[name][width]}")
    for width, error in found.la.items():
        if error < math.tanh(found.rate) / 2 - slack:
            wrong.append(f"LA of width {width} is below tanh(lambda)/2: {error}")
    return wrong


def draw(found: Findings, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, by_width in found.fixed.items():
        left.plot(WIDTHS, list(by_width.values()), "o-", label=f"fixed {name}, trained")
    left.plot(WIDTHS, [staircase_error(m) for m in WIDTHS], "k^:", label="fixed relu, by hand")
    left.plot(WIDTHS, [1 / (m + 1) for m in WIDTHS], "k--", label="lower bound 1/(m+1)")
    left.axhline(0.0, color="gold", lw=4, label="LA of width 1: exact")
    left.set(xlabel="width m", ylabel="W^{1,inf} error", title=relu_sum().text)
    left.set_xscale("log", base=2)
    left.set_ylim(top=1.6 * left.get_ylim()[1])
    x1, jumps = _jumps(found)
    right.plot(x1, torch.tanh(found.rate * x1), "tab:green", lw=4, label="target and width-1 MoA")
    right.plot(x1, jumps, "tab:red", label=f"trained LA of width {WIDTHS[-1]}")
    right.set(xlabel="x1", ylabel="jump of df/dx2 across x2 = 0", title=tanh_relu(found.rate).text)
    for axes in (left, right):
        axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


@torch.no_grad()
def _jumps(found: Findings) -> tuple[Tensor, Tensor]:
    """Along x1, the jump of the last trained LA net's x2-derivative."""
    x1 = torch.linspace(-1, 1, 200, dtype=torch.float64)
    above, below = (
        found.la_nets.evaluate(torch.stack([x1, torch.full_like(x1, side)], dim=1))[1][-1, :, 1]
        for side in (NUDGE, -NUDGE)
    )
    return x1, above - below


class Parser(argparse.ArgumentParser):
    """argparse leaves with 2, which no launcher of ours knows."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_INPUT, f"{self.prog}: {message}; see --help\n")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer steps and seeds (a few seconds)")
    add("--lambda", dest="rate", type=float, default=2.0, help="of tanh(lambda x1) (default: 2)")
    add("--seeds", type=int, help="networks for each width (default: 4, with --quick 2)")
    add("--steps", type=int, help="steps of training (default: 500, with --quick 100)")
    add("--out", type=Path, metavar="PNG", help="draw the bounds and the jump of the gradient")
    arguments = parser.parse_args(argv)
    arguments.seeds = (
        arguments.seeds if arguments.seeds is not None else (2 if arguments.quick else 4)
    )
    arguments.steps = (
        arguments.steps if arguments.steps is not None else (100 if arguments.quick else 500)
    )
    if not 0 < arguments.rate < math.inf or min(arguments.seeds, arguments.steps) < 1:
        parser.error("--lambda, --seeds and --steps must be positive")
    if arguments.out and not arguments.out.resolve().parent.is_dir():
        parser.error(f"--out {arguments.out}: the folder does not exist, create it first")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)  # tensors this small leave a second thread waiting
    began = time.perf_counter()
    found = investigate(arguments.rate, arguments.steps, arguments.seeds)
    print(report(found))
    wrong = violations(found)
    for line in wrong:
        print(f"CONTRADICTION: {line}")
    if arguments.out:
        try:
            draw(found, arguments.out)
        except OSError as error:
            print(f"cannot write {arguments.out}: {error}", file=sys.stderr)
            return EXIT_STORAGE
        print(f"\nwrote {arguments.out}")
    print(
        f"\n{'all bounds and constructions hold' if not wrong else 'see above'}; "
        f"{time.perf_counter() - began:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
