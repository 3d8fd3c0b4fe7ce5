// One row of a CPU kernel: its gates and folded weights, then its blocks of columns, then its sums.
#pragma once

#include "cpu_math.h"

namespace {

// What a row needs besides its elements: mixing weights and the coefficients folded from them.
struct Row {
    float weight[PADDED], scale;
    V y[BASIS], z[BASIS], pairs[PAIRS];
};

INLINE void gates(const float* logits, Row& row) {
    float* w = row.weight;
    std::memset(w, 0, sizeof row.weight);
    std::memcpy(w, logits, N * sizeof(float));
    if (MOA_GATE == SOFTMAX) {
        for (int first = 0; first < N; first += BRANCH) {
            float top = w[first];
            for (int k = 1; k < BRANCH; k++) top = w[first + k] > top ? w[first + k] : top;
            for (int k = 0; k < BRANCH; k++) w[first + k] -= top;
        }
    }
    for (int k = 0; MOA_GATE != NO_GATE && k < PADDED; k += W) {
        V x = Float32::load(w + k);
        if (MOA_GATE == SIGMOID) x = parts<1u << SILU, true>(x).sigmoid;
        if (MOA_GATE == TANH_GATE) x = parts<1u << TANH, true>(x).tanh;
        if (MOA_GATE == SOFTMAX) x = expm1<true>(clamp_low(x, -LARGEST_ONE), 1.0f) + 1.0f;
        Float32::store(w + k, x);
    }
    for (int first = 0; MOA_GATE == SOFTMAX && first < N; first += BRANCH) {
        float total = 0.0f;
        for (int k = 0; k < BRANCH; k++) total += w[first + k];
        for (int k = 0; k < BRANCH; k++) w[first + k] /= total;
    }
}

INLINE void fold(const float* weight, float scale, V* c) {
#pragma GCC unroll 8
    for (int j = 0; j < BASIS; j++) {
        float total = 0.0f;
#pragma GCC unroll 8
        for (int k = 0; k < K; k++)
            if (MATRIX[k][j] != 0.0f) total += weight[k] * MATRIX[k][j];
        c[j] = all(total * scale);
    }
}

INLINE void prepare(const float* logits, float scale, Row& row) {
    gates(logits, row);
    row.scale = scale;
    if (MOA_VARIANT == QD) {
        for (int k = 0; k < PAIRS; k++) row.pairs[k] = all(row.weight[k] * scale);
        return;
    }
    if (MOA_VARIANT == BI) fold(row.weight, 1.0f, row.y);
    fold(row.weight + (MOA_VARIANT == BI ? K : 0), scale, row.z);
}

// sum over m >= k of c_km zs[m]; sum over k <= m of c_km ys[k].
INLINE V row_of_pairs(const V* c, const V (*zs)[BLOCK], int i, int k) {
    V total = c[pair(k, k)] * zs[k][i];
#pragma GCC unroll 8
    for (int m = k + 1; m < K; m++) total += c[pair(k, m)] * zs[m][i];
    return total;
}

INLINE V column_of_pairs(const V* c, const V (*ys)[BLOCK], int i, int m) {
    V total = c[m] * ys[0][i];
#pragma GCC unroll 8
    for (int k = 1; k <= m; k++) total += c[pair(k, m)] * ys[k][i];
    return total;
}

typedef V Buffer[BLOCK];

// One block of a row: `count` vectors of y and z to hidden.
template <class D>
INLINE void forward_block(const Row& row, const typename D::type* y, const typename D::type* z,
                          typename D::type* hidden, int count) {
    constexpr bool FINE = D::FINE;
    Buffer zs[MOA_VARIANT == QD ? K : 1], ys[MOA_VARIANT == QD ? K : 1];
    for (int i = 0; i < count; i++) {
        const Parts p = parts<DICTIONARY, FINE>(D::load(z + i * W));
        if (MOA_VARIANT == QD) {
            V b[BASIS];
            basis_values<DICTIONARY>(p, b);
            activations(b, zs, i);
        } else if (MOA_VARIANT == TYPE1) {
            D::store(hidden + i * W, mixed<DICTIONARY>(row.z, p));
        } else {
            zs[0][i] = mixed<DICTIONARY>(row.z, p);
        }
    }
    for (int i = 0; MOA_VARIANT != TYPE1 && i < count; i++) {
        const V x = D::load(y + i * W);
        V out;
        if (MOA_VARIANT == ONE) {
            out = x * parts<1u << SILU, FINE>(x).sigmoid * zs[0][i];
        } else if (MOA_VARIANT == BI) {
            out = mixed<DICTIONARY>(row.y, parts<DICTIONARY, FINE>(x)) * zs[0][i];
        } else {
            V b[BASIS];
            basis_values<DICTIONARY>(parts<DICTIONARY, FINE>(x), b);
            activations(b, ys, i);
            out = ys[0][i] * row_of_pairs(row.pairs, zs, i, 0);
#pragma GCC unroll 8
            for (int k = 1; k < K; k++) out += ys[k][i] * row_of_pairs(row.pairs, zs, i, k);
        }
        D::store(hidden + i * W, out);
    }
}

// Adds g b_j, summed over a block, to the sums of a row.
template <unsigned MASK>
INLINE void add_sums(V* sums, const V* g, const Buffer* b, int count) {
    V total[BASIS] = {};
    for (int i = 0; i < count; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < BASIS; j++)
            if (has(MASK, j)) total[j] += g[i] * b[j][i];
    }
    for (int j = 0; j < BASIS; j++)
        if (has(MASK, j)) sums[j] += total[j];
}

// Values of the mixture, its slope and the basis for one block of a branch.
template <class D, unsigned MASK>
INLINE void branch(const V* c, const typename D::type* x, V* value, V* slope, Buffer* b,
                   int count) {
    for (int i = 0; i < count; i++) {
        const Parts p = parts<MASK, D::FINE>(D::load(x + i * W));
        V values[BASIS];
        basis_values<MASK>(p, values);
        if (value) value[i] = mixed<MASK>(c, p);
        slope[i] = mixed_slope<MASK, D::FINE>(c, p);
#pragma GCC unroll 8
        for (int j = 0; j < BASIS; j++)
            if (has(MASK, j)) b[j][i] = values[j];
    }
}

struct Sums {
    V y[BASIS], z[BASIS], pairs[PAIRS];
};

template <class D>
INLINE void backward_block(const Row& row, const typename D::type* grad,
                           const typename D::type* y, const typename D::type* z,
                           typename D::type* grad_y, typename D::type* grad_z, Sums& sums,
                           int count) {
    Buffer zs[BASIS], ys[BASIS], value_z, value_y, slope_z, slope_y, g;
    branch<D, DICTIONARY>(row.z, z, MOA_VARIANT == TYPE1 ? nullptr : value_z, slope_z, zs, count);
    if (MOA_VARIANT == TYPE1) {
    for (int i = 0; i < count; i++) {
            g[i] = D::load(grad + i * W);
            D::store(grad_z + i * W, g[i] * slope_z[i]);
        }
        add_sums<DICTIONARY>(sums.z, g, zs, count);
        return;
    }
    if (MOA_VARIANT == BI) {
        branch<D, DICTIONARY>(row.y, y, value_y, slope_y, ys, count);
    } else {
        V one[BASIS];
        one[SILU] = all(1.0f);
        branch<D, 1u << SILU>(one, y, value_y, slope_y, ys, count);
    }
    Buffer g_z;
    for (int i = 0; i < count; i++) {
        const V upstream = D::load(grad + i * W);
        g[i] = upstream * value_z[i];
        g_z[i] = upstream * value_y[i];
        D::store(grad_y + i * W, g[i] * slope_y[i]);
        D::store(grad_z + i * W, g_z[i] * slope_z[i]);
    }
    add_sums<DICTIONARY>(sums.z, g_z, zs, count);
    if (MOA_VARIANT == BI) add_sums<DICTIONARY>(sums.y, g, ys, count);
}

// Values and slopes of the K activations for one block.
template <class D>
INLINE void activate(const typename D::type* x, Buffer* values, Buffer* slopes, int count) {
    for (int i = 0; i < count; i++) {
        const Parts p = parts<DICTIONARY, D::FINE>(D::load(x + i * W));
        V b[BASIS];
        basis_values<DICTIONARY>(p, b);
        activations(b, values, i);
        basis_slopes<DICTIONARY, D::FINE>(p, b);
        activations(b, slopes, i);
    }
}

template <class D>
INLINE void backward_pairs(const Row& row, const typename D::type* grad,
                           const typename D::type* y, const typename D::type* z,
                           typename D::type* grad_y, typename D::type* grad_z, Sums& sums,
                           int count) {
    Buffer zs[K], ys[K], slope_z[K], slope_y[K];
    activate<D>(z, zs, slope_z, count);
    activate<D>(y, ys, slope_y, count);
    const V* c = row.pairs;
    for (int i = 0; i < count; i++) {
        const V g = D::load(grad + i * W);
        V out_y = slope_y[0][i] * row_of_pairs(c, zs, i, 0);
        V out_z = slope_z[0][i] * column_of_pairs(c, ys, i, 0);
#pragma GCC unroll 8
        for (int k = 1; k < K; k++) {
            out_y += slope_y[k][i] * row_of_pairs(c, zs, i, k);
            out_z += slope_z[k][i] * column_of_pairs(c, ys, i, k);
        }
        D::store(grad_y + i * W, g * out_y);
        D::store(grad_z + i * W, g * out_z);
#pragma GCC unroll 8
        for (int k = 0; k < K; k++) ys[k][i] *= g;
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
        V total[K] = {};
    for (int i = 0; i < count; i++) {
#pragma GCC unroll 8
            for (int m = k; m < K; m++) total[m] += ys[k][i] * zs[m][i];
        }
        for (int m = k; m < K; m++) sums.pairs[pair(k, m)] += total[m];
    }
}

// Gradients of the mixing weights (before the token weight), one row.
INLINE void unfold(const V* sums, float* d) {
#pragma GCC unroll 8
    for (int j = 0; j < BASIS; j++) {
        const float total = has(DICTIONARY, j) ? sum(sums[j]) : 0.0f;
#pragma GCC unroll 8
        for (int k = 0; k < K; k++)
            if (MATRIX[k][j] != 0.0f) d[k] += total * MATRIX[k][j];
    }
}

// Gradients of the logits [N] and of the token weight from the sums of a row.
INLINE void finish(const Row& row, const Sums& sums, float* grad_logits, float* grad_weight) {
    constexpr int FIRST = MOA_VARIANT == BI ? K : 0;  // the token weight is on the branch of z
    float d[N] = {}, d_scale = 0.0f;
    if (MOA_VARIANT == BI) unfold(sums.y, d);
    if (MOA_VARIANT == QD)
        for (int k = 0; k < N; k++) d[k] = sum(sums.pairs[k]);
    else
        unfold(sums.z, d + FIRST);
    for (int k = FIRST; k < N; k++) {
        d_scale += row.weight[k] * d[k];
        d[k] *= row.scale;
    }
    if (grad_weight) *grad_weight = d_scale;
    for (int first = 0; first < N; first += BRANCH) {
        float mean = 0.0f;
        for (int k = first; MOA_GATE == SOFTMAX && k < first + BRANCH; k++)
            mean += d[k] * row.weight[k];
        for (int k = first; k < first + BRANCH; k++) {
            const float w = row.weight[k];
            float slope = d[k];
            if (MOA_GATE == SIGMOID) slope *= w * (1.0f - w);
            if (MOA_GATE == TANH_GATE) slope *= 1.0f - w * w;
            if (MOA_GATE == SOFTMAX) slope = w * (slope - mean);
            grad_logits[k] = slope;
        }
    }
}

}  // namespace
