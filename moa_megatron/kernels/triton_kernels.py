"""Forward and backward of the mixture in Triton: one pass over memory each.

One warp owns a row (token): its gates sit in registers, its sums over D need no other warp, so they
are deterministic and the same for every number of rows per program. README.md has the derivation.

Two tile forms. Form 0 is [ROWS, 32, VEC]: a lane holds 16 neighbouring bytes. Form 1, for rows that
do not start at 16-byte addresses, is [ROWS, VEC, 32]: neighbouring lanes hold neighbouring columns.
In both, a lane first sums what it holds ([ROWS, 32]); lanes meet once, after the last column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa_megatron.kernels.triton_math import (
    SILU,
    add,
    basis_slopes,
    basis_values,
    combine,
    constant,
    mixed,
    mixed_slope,
    parts,
    widen,
)
from moa_megatron.kernels.triton_rows import (
    activations,
    coefficients,
    column_of_pairs,
    gate_slope,
    gates,
    pair,
    row_of_pairs,
    spread,
    weight_gradients,
)

# Alignment comes from UNIT alone: one kernel per tile form, whatever the strides are.
STRIDES = ["preact_stride", "hidden_stride", "grad_stride", "grad_preact_stride", "logits_stride"]
SILU_ONLY = tl.constexpr((False, False, False, True, False, False))


@triton.jit(do_not_specialize=STRIDES)
def mixture_forward(
    preact,
    logits,
    token_weight,
    hidden,
    rows,
    preact_stride,
    hidden_stride,
    logits_stride,
    PLAN: tl.constexpr,
    ROWS: tl.constexpr,
    FORM: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
):
    wanted = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(wanted, rows - 1)
    in_range = spread(wanted < rows)
    scale = row_scale(token_weight, row, PLAN)
    c = coefficients(gates(logits, row, logits_stride, PLAN), scale, PLAN)
    source = preact + spread(row * (preact_stride * UNIT))
    target = hidden + spread(row * (hidden_stride * UNIT))
    column = columns(FORM, VEC)
    CHUNK: tl.constexpr = 32 * VEC
    WHOLE: tl.constexpr = PLAN.width // CHUNK * CHUNK
    for d in tl.range(0, WHOLE, CHUNK, loop_unroll_factor=2):
        out = mixed_tile(source + column + d, True, c, PLAN, FORM)
        tl.store(target + column + d, out.to(hidden.dtype.element_ty), mask=in_range)
    if PLAN.width > WHOLE:
        last = column + WHOLE
        inside = last < PLAN.width
        out = mixed_tile(source + last, inside, c, PLAN, FORM)
        tl.store(target + last, out.to(hidden.dtype.element_ty), mask=in_range & inside)


@triton.jit(do_not_specialize=STRIDES)
def mixture_backward(
    grad,
    preact,
    logits,
    token_weight,
    grad_preact,
    grad_logits,
    grad_weight,
    rows,
    grad_stride,
    preact_stride,
    grad_preact_stride,
    logits_stride,
    PLAN: tl.constexpr,
    ROWS: tl.constexpr,
    FORM: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
):
    wanted = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(wanted, rows - 1)
    in_range = spread(wanted < rows)
    scale = row_scale(token_weight, row, PLAN)
    weights = gates(logits, row, logits_stride, PLAN)
    c = coefficients(weights, scale, PLAN)
    sums = zero_sums(PLAN, ROWS)
    upstream = grad + spread(row * (grad_stride * UNIT))
    source = preact + spread(row * (preact_stride * UNIT))
    target = grad_preact + spread(row * (grad_preact_stride * UNIT))
    column = columns(FORM, VEC)
    CHUNK: tl.constexpr = 32 * VEC
    WHOLE: tl.constexpr = PLAN.width // CHUNK * CHUNK
    for d in range(0, WHOLE, CHUNK):
        g = tile(upstream + column + d, True, FORM)
        out, sums = gradient_tile(g, source + column + d, True, c, sums, PLAN, FORM)
        store_gradients(target + column + d, out, in_range, PLAN)
    if PLAN.width > WHOLE:
        last = column + WHOLE
        inside = last < PLAN.width
        g = tile(upstream + last, inside, FORM)
        out, sums = gradient_tile(g, source + last, inside, c, sums, PLAN, FORM)
        store_gradients(target + last, out, in_range & inside, PLAN)
    d_weights, d_scale = weight_gradients(sums, weights, scale, PLAN)
    d_logits = gate_slope(d_weights, weights, PLAN)
    mask = wanted < rows
    if PLAN.weighted:
        tl.store(grad_weight + row, d_scale.to(grad_weight.dtype.element_ty), mask=mask)
    for k in tl.static_range(len(d_logits)):
        at = grad_logits + row * len(d_logits) + k
        tl.store(at, d_logits[k].to(grad_logits.dtype.element_ty), mask=mask)


@triton.jit
def row_scale(token_weight, row, PLAN: tl.constexpr):
    """The routing weight of each row, or 1."""
    if PLAN.weighted:
        scale = tl.load(token_weight + row).to(tl.float32)
    else:
        scale = tl.full(row.shape, 1.0, tl.float32)
    return scale


@triton.jit
def columns(FORM: tl.constexpr, VEC: tl.constexpr):
    """Column offsets of a tile: [1, 32, VEC] or [1, VEC, 32]."""
    if FORM == 0:
        result = tl.arange(0, 32)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    else:
        result = tl.arange(0, VEC)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    return result


@triton.jit
def tile(source, inside, FORM: tl.constexpr):
    """A tile in float32; ``inside`` is a mask, or True for one that lies inside as a whole."""
    if inside is True:
        result = widen(tl.load(source), FORM == 0)
    else:
        result = widen(tl.load(source, mask=inside, other=0.0), FORM == 0)
    return result


@triton.jit
def mixed_tile(source, inside, c, PLAN: tl.constexpr, FORM: tl.constexpr):
    """The hidden vector of one tile."""
    if PLAN.variant == "type1":
        out = mixed(c[0], tile(source, inside, FORM), PLAN)
    else:
        y = tile(source, inside, FORM)
        z = tile(source + PLAN.width, inside, FORM)
        if PLAN.variant == "one":
            out = y * parts(y, SILU_ONLY, PLAN)[SILU] * mixed(c[0], z, PLAN)
        elif PLAN.variant == "bi":
            out = mixed(c[0], y, PLAN) * mixed(c[1], z, PLAN)
        else:
            K: tl.constexpr = len(PLAN.matrix)
            ys = activations(basis_values(parts(y, constant(PLAN.used), PLAN)), PLAN)
            zs = activations(basis_values(parts(z, constant(PLAN.used), PLAN)), PLAN)
            out = ys[0] * row_of_pairs(c, zs, 0, K)
            for k in tl.static_range(1, K):
                out += ys[k] * row_of_pairs(c, zs, k, K)
    return out


@triton.jit
def gradient_tile(g, source, inside, c, sums, PLAN: tl.constexpr, FORM: tl.constexpr):
    """Gradients of one tile's pre-activations, (dy, dz) or (dz,), and the sums carried on."""
    if PLAN.variant == "type1":
        z_parts = parts(tile(source, inside, FORM), constant(PLAN.used), PLAN)
        sums = accumulate(sums, g, basis_values(z_parts), PLAN, FORM)
        out = (g * mixed_slope(c[0], z_parts, PLAN),)
    else:
        y = tile(source, inside, FORM)
        z_parts = parts(tile(source + PLAN.width, inside, FORM), constant(PLAN.used), PLAN)
        if PLAN.variant == "one":
            y_parts = parts(y, SILU_ONLY, PLAN)
            z_values = basis_values(z_parts)
            g_z = g * (y * y_parts[SILU])
            g_y = g * combine(c[0], z_values, PLAN)
            sums = accumulate(sums, g_z, z_values, PLAN, FORM)
            out = (
                g_y * basis_slopes(y_parts)[SILU],
                g_z * mixed_slope(c[0], z_parts, PLAN),
            )
        else:
            y_parts = parts(y, constant(PLAN.used), PLAN)
            if PLAN.variant == "bi":
                out, sums = product_gradients(g, y_parts, z_parts, c, sums, PLAN, FORM)
            else:
                out, sums = pair_gradients(g, y_parts, z_parts, c, sums, PLAN, FORM)
    return out, sums


@triton.jit
def product_gradients(g, y_parts, z_parts, c, sums, PLAN: tl.constexpr, FORM: tl.constexpr):
    """Both branches mixed: bi."""
    y_values = basis_values(y_parts)
    z_values = basis_values(z_parts)
    g_y = g * combine(c[1], z_values, PLAN)
    g_z = g * combine(c[0], y_values, PLAN)
    y_sums = accumulate(sums[:6], g_y, y_values, PLAN, FORM)
    z_sums = accumulate(sums[6:], g_z, z_values, PLAN, FORM)
    out = (
        g_y * mixed_slope(c[0], y_parts, PLAN),
        g_z * mixed_slope(c[1], z_parts, PLAN),
    )
    return out, y_sums + z_sums


@triton.jit
def pair_gradients(g, y_parts, z_parts, c, sums, PLAN: tl.constexpr, FORM: tl.constexpr):
    """All pairs of activations: qd."""
    K: tl.constexpr = len(PLAN.matrix)
    ys = activations(basis_values(y_parts), PLAN)
    zs = activations(basis_values(z_parts), PLAN)
    y_slopes = activations(basis_slopes(y_parts), PLAN)
    z_slopes = activations(basis_slopes(z_parts), PLAN)
    d_y = y_slopes[0] * row_of_pairs(c, zs, 0, K)
    d_z = z_slopes[0] * column_of_pairs(c, ys, 0, K)
    for k in tl.static_range(1, K):
        d_y += y_slopes[k] * row_of_pairs(c, zs, k, K)
        d_z += z_slopes[k] * column_of_pairs(c, ys, k, K)
    new_sums = ()
    for k in tl.static_range(K):
        g_y = g * ys[k]
        for m in tl.static_range(k, K):
            new_sums = new_sums + (sums[pair(k, m, K)] + lane_sum(g_y * zs[m], FORM),)
    return (g * d_y, g * d_z), new_sums


@triton.jit
def zero_sums(PLAN: tl.constexpr, ROWS: tl.constexpr):
    """One sum for each basis function of a branch, or for each pair."""
    sums = ()
    for _ in tl.static_range(sum_count(PLAN.variant, PLAN.sizes)):
        sums = sums + (tl.zeros([ROWS, 32], tl.float32),)
    return sums


@triton.constexpr_function
def sum_count(variant, sizes):
    """Sums that the backward pass carries."""
    return {"qd": sum(sizes), "bi": 12}.get(variant, 6)


@triton.jit
def accumulate(sums, factor, functions, PLAN: tl.constexpr, FORM: tl.constexpr):
    """Adds factor * f_j, summed over what a lane holds, for each basis function in use."""
    result = ()
    for j in tl.static_range(6):
        total = sums[j]
        if PLAN.used[j]:
            total += lane_sum(factor * functions[j], FORM)
        result = result + (total,)
    return result


@triton.jit
def lane_sum(values, FORM: tl.constexpr):
    """Sum of what one lane holds: [ROWS, 32]."""
    return tl.reduce(values, 2 if FORM == 0 else 1, add)


@triton.jit
def store_gradients(target, out, mask, PLAN: tl.constexpr):
    """dy, then dz D columns further; or the only one."""
    for i in tl.static_range(len(out)):
        tl.store(target + i * PLAN.width, out[i].to(target.dtype.element_ty), mask=mask)
