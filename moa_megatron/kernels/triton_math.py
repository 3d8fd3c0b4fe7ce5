"""Device functions of the Triton kernels: the basis, its derivatives, gates. All in float32."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter has no inline assembly; there the plain operators stand in for one instruction.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
# log2 of the normal density at 0: phi(x) = 2^(LOG2_PHI0 - x^2 log2(e) / 2)
LOG2_PHI0 = tl.constexpr(-1.3257480647361592)
# exp(-x) is cut off here, so that (1 + e)(1 + e^2) stays finite; silu(x) is then below 1e-12 |x|.
LARGEST_EXP = tl.constexpr(2.0**40)

X, RELU, RELU2, SILU, TAIL, TANH = (tl.constexpr(i) for i in range(6))


@triton.jit
def exp2(x):
    """2^x by one special-function operation."""
    if INTERPRETED:
        result = tl.exp2(x)
    else:
        result = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def reciprocal(x):
    """1 / x by one special-function operation."""
    if INTERPRETED:
        result = 1.0 / x
    else:
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def widen(x, PAIRED: tl.constexpr):
    """To float32; two bf16 that share a register take one instruction each."""
    if INTERPRETED or x.dtype != tl.bfloat16 or not PAIRED:
        result = x.to(tl.float32)
    else:
        result = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return result


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def small_tanh(x):
    """tanh by its series, for |x| < 0.25: relative error 1e-7 where 2 s - 1 would cancel."""
    square = x * x
    series = square * (-17.0 / 315.0) + 2.0 / 15.0
    series = square * series - 1.0 / 3.0
    series = series + square * square * square * (62.0 / 2835.0)
    return x + x * square * series


@triton.constexpr_function
def first_used(flags):
    """Index of the first true (or non-zero) entry."""
    return [bool(flag) for flag in flags].index(True)


@triton.constexpr_function
def constant(value):
    """A field of the plan as a compile-time argument of another function."""
    return value


@triton.jit
def parts(x, USED: tl.constexpr, PLAN: tl.constexpr):
    """What the basis is made of: (x, max(x, 0), |x|, sigmoid(x), Phi(-|x|), tanh(x)).

    Entries that USED does not ask for are x. Sigmoid and tanh share the reciprocal of
    (1 + e)(1 + e^2), where e = exp(-x).
    """
    sigmoid, cdf, tanh = x, x, x
    if USED[SILU] and USED[TANH]:
        e = decay(x)
        u = e + 1.0
        v = e * e + 1.0
        r = reciprocal(u * v)
        sigmoid = v * r
        tanh = u * r
    elif USED[SILU]:
        sigmoid = reciprocal(exp2(x * -LOG2E) + 1.0)
    elif USED[TANH]:
        tanh = reciprocal(exp2(x * (-2.0 * LOG2E)) + 1.0)
    if USED[TANH]:
        tanh = tanh * 2.0 - 1.0
        if PLAN.exact:
            tanh = tl.where(tl.abs(x) < 0.25, small_tanh(x), tanh)
    a = tl.abs(x)
    if USED[TAIL]:
        cdf = lower_tail(a, PLAN)
    return x, rectified(x), a, sigmoid, cdf, tanh


@triton.jit
def rectified(x):
    """max(x, 0); NaN stays, as a diverged run must show."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def decay(x):
    """exp(-x), cut off where its cube would overflow."""
    return tl.minimum(exp2(x * -LOG2E), LARGEST_EXP)


@triton.jit
def lower_tail(a, PLAN: tl.constexpr):
    """Phi(-a) = 2^Q(a) for a >= 0."""
    q = PLAN.tail[len(PLAN.tail) - 1]
    for i in tl.static_range(len(PLAN.tail) - 1):
        q = q * a + PLAN.tail[len(PLAN.tail) - 2 - i]
    return exp2(q)


@triton.jit
def basis_values(p):
    x, positive, a, sigmoid, cdf, tanh = p
    return x, positive, positive * positive, x * sigmoid, a * cdf, tanh


@triton.jit
def basis_slopes(p):
    """Derivatives of the basis; at 0 the one from the left, as PyTorch takes it."""
    x, positive, a, sigmoid, cdf, tanh = p
    silu = x * sigmoid
    d_silu = (silu - silu * sigmoid) + sigmoid
    density = exp2((a * a) * (-0.5 * LOG2E) + LOG2_PHI0)
    odd = a * density - cdf
    d_tail = tl.where(x > 0.0, -odd, odd)
    step = tl.where(x > 0.0, 1.0, 0.0)
    return 1.0, step, 2.0 * positive, d_silu, d_tail, 1.0 - tanh * tanh


@triton.jit
def mixed(c, x, PLAN: tl.constexpr):
    """sum_j c_j b_j(x) with the fewest operations: what the forward pass needs."""
    if PLAN.used[SILU] and PLAN.used[TANH] and not PLAN.exact:
        # One fraction: r ((c_silu x) v + 2 c_tanh (1 + e)) - c_tanh, with r = 1 / ((1 + e) v).
        # Its cancellation at small x is far below a bf16 step; float32 results would show it.
        e = decay(x)
        v = e * e + 1.0
        twice = 2.0 * c[TANH]
        numerator = twice * e + ((x * c[SILU]) * v + twice)
        total = reciprocal(e * v + v) * numerator + (x * c[X] - c[TANH])
    else:
        _, _, _, sigmoid, _, tanh = parts(x, constant(PLAN.used), PLAN)
        total = x * c[X]
        if PLAN.used[SILU]:
            total = x * (c[SILU] * sigmoid + c[X])
        if PLAN.used[TANH]:
            total += c[TANH] * tanh
    positive = rectified(x)
    if PLAN.used[RELU] and PLAN.used[RELU2]:
        total += positive * (c[RELU2] * positive + c[RELU])
    elif PLAN.used[RELU]:
        total += positive * c[RELU]
    elif PLAN.used[RELU2]:
        total += positive * (c[RELU2] * positive)
    if PLAN.used[TAIL]:
        a = tl.abs(x)
        total += a * (c[TAIL] * lower_tail(a, PLAN))
    return total


@triton.jit
def mixed_slope(c, p, PLAN: tl.constexpr):
    """sum_j c_j b_j'(x) from the parts, with the fewest operations."""
    x, positive, a, sigmoid, cdf, tanh = p
    total = c[X]
    if PLAN.used[TANH]:
        total = c[TANH] * (1.0 - tanh * tanh) + total
    if PLAN.used[SILU]:
        total = c[SILU] * (sigmoid * (x - x * sigmoid) + sigmoid) + total
    if PLAN.used[RELU2]:
        total = (2.0 * c[RELU2]) * positive + total
    step = tl.where(x > 0.0, 1.0, 0.0)
    if PLAN.used[TAIL]:
        density = exp2((a * a) * (-0.5 * LOG2E) + LOG2_PHI0)
        left = a * density - cdf
        total = c[TAIL] * left + total
        total = step * ((-2.0 * c[TAIL]) * left + c[RELU]) + total
    elif PLAN.used[RELU]:
        total = step * c[RELU] + total
    return total


@triton.jit
def combine(c, functions, PLAN: tl.constexpr):
    """sum_j c_j f_j over the basis functions in use."""
    FIRST: tl.constexpr = first_used(PLAN.used)
    total = c[FIRST] * functions[FIRST]
    for j in tl.static_range(FIRST + 1, 6):
        if PLAN.used[j]:
            total += c[j] * functions[j]
    return total
