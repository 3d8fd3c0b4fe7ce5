"""Device functions for what a row has once: gates, folded weights, and their gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from moa_megatron.kernels.triton_math import LOG2E, exp2, first_used, reciprocal, small_tanh


@triton.constexpr_function
def item(entries, index):
    """An entry of a compile-time tuple, as a compile-time value."""
    return entries[index]


@triton.constexpr_function
def start(sizes, branch):
    """Index of a branch's first coefficient."""
    return sum(sizes[:branch])


@triton.jit
def gates(logits, row, stride, PLAN: tl.constexpr):
    """The mixing weights of each row: a tuple of [ROWS] in float32."""
    values = ()
    for branch in tl.static_range(len(PLAN.sizes)):
        raw = ()
        for k in tl.static_range(item(PLAN.sizes, branch)):
            at = logits + row * stride + (start(PLAN.sizes, branch) + k)
            raw = raw + (tl.load(at).to(tl.float32),)
        values = values + gate(raw, PLAN)
    return values


@triton.jit
def gate(raw, PLAN: tl.constexpr):
    values = ()
    if PLAN.gate == "softmax":
        top = raw[0]
        for k in tl.static_range(1, len(raw)):
            top = tl.maximum(top, raw[k])
        total = top * 0.0
        for k in tl.static_range(len(raw)):
            total += exp2((raw[k] - top) * LOG2E)
        for k in tl.static_range(len(raw)):
            values = values + (exp2((raw[k] - top) * LOG2E) / total,)
    else:
        for k in tl.static_range(len(raw)):
            x = raw[k]
            if PLAN.gate == "sigmoid":
                x = reciprocal(exp2(x * -LOG2E) + 1.0)
            elif PLAN.gate == "tanh":
                large = reciprocal(exp2(x * (-2.0 * LOG2E)) + 1.0) * 2.0 - 1.0
                x = tl.where(tl.abs(x) < 0.25, small_tanh(x), large)
            values = values + (x,)
    return values


@triton.jit
def gate_slope(d_weights, weights, PLAN: tl.constexpr):
    """From gradients of the mixing weights to those of the logits."""
    result = ()
    for branch in tl.static_range(len(PLAN.sizes)):
        mean = d_weights[0] * 0.0
        if PLAN.gate == "softmax":
            for i in tl.static_range(item(PLAN.sizes, branch)):
                d = d_weights[start(PLAN.sizes, branch) + i]
                mean += d * weights[start(PLAN.sizes, branch) + i]
        for i in tl.static_range(item(PLAN.sizes, branch)):
            d = d_weights[start(PLAN.sizes, branch) + i]
            w = weights[start(PLAN.sizes, branch) + i]
            if PLAN.gate == "sigmoid":
                d = d * (w * (1.0 - w))
            elif PLAN.gate == "tanh":
                d = d * (1.0 - w * w)
            elif PLAN.gate == "softmax":
                d = w * (d - mean)
            result = result + (d,)
    return result


@triton.jit
def spread(row_value):
    """[ROWS] to a shape that broadcasts over a tile."""
    return row_value[:, None, None]


@triton.jit
def coefficients(weights, scale, PLAN: tl.constexpr):
    """What a tile is mixed with: folded weights per branch, or the weights of all pairs.

    The routing weight ``scale`` goes into the last branch: no tile ever multiplies by it.
    """
    if PLAN.variant == "qd":
        result = ()
        for k in tl.static_range(len(weights)):
            result = result + (spread(weights[k] * scale),)
    elif PLAN.variant == "bi":
        one = scale * 0.0 + 1.0
        z_first: tl.constexpr = len(PLAN.matrix)
        result = (fold(weights, 0, one, PLAN), fold(weights, z_first, scale, PLAN))
    else:
        result = (fold(weights, 0, scale, PLAN),)
    return result


@triton.jit
def fold(weights, FIRST: tl.constexpr, scale, PLAN: tl.constexpr):
    """Coefficients of the basis, c_j = sum_k w_k M[k][j]."""
    folded = ()
    for j in tl.static_range(6):
        c = scale * 0.0
        for k in tl.static_range(len(PLAN.matrix)):
            if PLAN.matrix[k][j] != 0.0:
                c += weights[FIRST + k] * (scale * PLAN.matrix[k][j])
        folded = folded + (spread(c),)
    return folded


@triton.jit
def weight_gradients(sums, weights, scale, PLAN: tl.constexpr):
    """From the sums over D to gradients of the mixing weights and of the routing weight.

    The sums are those of the folded weights: dw_k = sum_j M[k][j] S_j, times ``scale`` in the last
    branch, whose dw also give d scale = sum_k w_k dw_k.
    """
    totals = ()
    for j in tl.static_range(len(sums)):
        totals = totals + (tl.sum(sums[j], 1),)
    if PLAN.variant == "qd":
        before = ()
        last = totals
    elif PLAN.variant == "bi":
        before = activations(totals, PLAN)
        last = activations(totals[6:], PLAN)
    else:
        before = ()
        last = activations(totals, PLAN)
    d_scale = scale * 0.0
    d_weights = before
    for k in tl.static_range(len(last)):
        d_scale += weights[len(before) + k] * last[k]
        d_weights = d_weights + (last[k] * scale,)
    return d_weights, d_scale


@triton.jit
def activations(basis, PLAN: tl.constexpr):
    """Values (or slopes) of the activations themselves, from those of the basis."""
    result = ()
    for k in tl.static_range(len(PLAN.matrix)):
        result = result + (activation(basis, item(PLAN.matrix, k)),)
    return result


@triton.jit
def activation(basis, ROW: tl.constexpr):
    FIRST: tl.constexpr = first_used(ROW)
    total = basis[FIRST] * ROW[FIRST]
    for j in tl.static_range(FIRST + 1, 6):
        if ROW[j] != 0.0:
            total += basis[j] * ROW[j]
    return total


@triton.constexpr_function
def pair(k, m, size):
    """Index of the pair (k, m), k <= m, row-major over a dictionary of `size`."""
    return k * size - k * (k - 1) // 2 + m - k


@triton.jit
def row_of_pairs(c, zs, k: tl.constexpr, K: tl.constexpr):
    """sum over m >= k of c_km sigma_m(z)."""
    total = c[pair(k, k, K)] * zs[k]
    for m in tl.static_range(k + 1, K):
        total += c[pair(k, m, K)] * zs[m]
    return total


@triton.jit
def column_of_pairs(c, ys, m: tl.constexpr, K: tl.constexpr):
    """sum over k <= m of c_km sigma_k(y)."""
    total = c[pair(0, m, K)] * ys[0]
    for k in tl.static_range(1, m + 1):
        total += c[pair(k, m, K)] * ys[k]
    return total
