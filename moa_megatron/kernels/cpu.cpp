// Forward and backward of the mixture on a CPU: one pass over memory each.
//
// Compiled once per MoAConfig by cpu_op.py, which defines
//   MOA_VARIANT  0 type1, 1 one, 2 bi, 3 qd        MOA_GATE  0 sigmoid, 1 tanh, 2 softmax, 3 none
//   MOA_K        size of the dictionary            MOA_MATRIX  its K rows in the basis of basis.py
//   MOA_TAIL_FINE, MOA_TAIL_COARSE                 log2 Phi(-a), lowest power first
// A row is walked in blocks that stay in the first cache: the functions of z into buffers, then
// those of y, then the sums, so that each loop fits the registers. All arithmetic is float32. A row
// never meets another, so the number of threads changes nothing.

#include <cstdint>
#include <cstring>
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
#if defined(__FLT16_MANT_DIG__)
typedef _Float16 F16V __attribute__((vector_size(2 * W)));
#endif

#define INLINE inline __attribute__((always_inline))

constexpr int TYPE1 = 0, ONE = 1, BI = 2, QD = 3;
constexpr int SIGMOID = 0, TANH_GATE = 1, SOFTMAX = 2, NO_GATE = 3;
constexpr int X = 0, RELU = 1, RELU2 = 2, SILU = 3, TAIL = 4, TANH = 5, BASIS = 6;
constexpr int K = MOA_K, PAIRS = K * (K + 1) / 2;
constexpr int N = MOA_VARIANT == QD ? PAIRS : MOA_VARIANT == BI ? 2 * K : K;
constexpr int BRANCHES = MOA_VARIANT == BI ? 2 : 1, BRANCH = N / BRANCHES;
constexpr int PADDED = (N + W - 1) / W * W;  // the gates of a row, in whole vectors
constexpr int BLOCK = 16;                    // vectors a block
constexpr int64_t PARALLEL_ELEMENTS = 1 << 14;  // fewer than this: one thread
constexpr float MATRIX[K][BASIS] = MOA_MATRIX;
constexpr float TAIL_FINE[] = MOA_TAIL_FINE, TAIL_COARSE[] = MOA_TAIL_COARSE;

// Minimax fits of this file. GROWTH: (2^f - 1) / f, relative; POWER: 2^f, relative, |f| <= 1/2.
// SLOPE: (a phi(a) - Phi(-a)) / Phi(-a), its error weighted by Phi(-a).
constexpr float GROWTH_FINE[] = {0.693147188f,   0.240226498f,   0.0555035743f,
                                 0.00961823749f, 0.00133907355f, 0.000154035128f};
constexpr float GROWTH_COARSE[] = {0.693136858f, 0.240232522f, 0.0558372887f, 0.00961811083f};
constexpr float POWER_FINE[] = {1.00000007f,   0.693146967f,   0.240221197f,
                                0.0555071327f, 0.00967554138f, 0.0013276472f};
constexpr float POWER_COARSE[] = {0.999928073f, 0.693260986f, 0.242611125f, 0.0551716695f};
constexpr float SLOPE_FINE[] = {-1.00000041f,   0.797912467f,   0.636323929f,    0.110161396f,
                                -0.0212897567f, 0.00198906763f, 5.90561226e-05f, -2.17145432e-05f};
constexpr float SLOPE_COARSE[] = {-0.999935904f, 0.795773563f, 0.646748346f, 0.0936307341f,
                                  -0.0112412601f};

constexpr float LOG2E = 1.44269504f;
// Adding it rounds to an integer, biased as exponents are.
constexpr float ROUND = 12582912.0f + 127.0f;
constexpr float LARGEST_TAIL = 8.5f;           // Phi(-8.5) = 2^-57: nothing is left of it
constexpr float LARGEST_BOTH = 27.5f;          // exp(4 * 27.5) is finite
constexpr float LARGEST_ONE = 80.0f;

constexpr unsigned needed() {
    unsigned mask = 0;
    for (int k = 0; k < K; k++)
        for (int j = 0; j < BASIS; j++)
            if (MATRIX[k][j] != 0.0f) mask |= 1u << j;
    return mask;
}
constexpr unsigned DICTIONARY = needed();
constexpr bool has(unsigned mask, int j) { return mask >> j & 1u; }
constexpr int pair(int k, int m) { return k * K - k * (k - 1) / 2 + m - k; }

INLINE V all(float x) { return x - V{}; }
// The instructions return their second operand where one is NaN: NaN stays.
INLINE V clamp_low(V x, float low) {
#if defined(__AVX512F__)
    return (V)_mm512_max_ps((__m512)all(low), (__m512)x);
#elif defined(__AVX2__)
    return (V)_mm256_max_ps((__m256)all(low), (__m256)x);
#else
    return x < all(low) ? all(low) : x;
#endif
}
INLINE V clamp_high(V x, float high) {
#if defined(__AVX512F__)
    return (V)_mm512_min_ps((__m512)all(high), (__m512)x);
#elif defined(__AVX2__)
    return (V)_mm256_min_ps((__m256)all(high), (__m256)x);
#else
    return x > all(high) ? all(high) : x;
#endif
}
INLINE V masked(I mask, V x) { return (V)(mask & (I)x); }
INLINE V magnitude(V x) { return (V)((I)x & 0x7fffffff); }

INLINE float sum(V x) {
    float total = 0.0f;
    for (int lane = 0; lane < W; lane++) total += x[lane];
    return total;
}

// One dtype each: to and from float32, to nearest, ties to even.
struct Float32 {
    typedef float type;
    static constexpr bool FINE = true;
    static INLINE V load(const float* from) {
        V x;
        std::memcpy(&x, from, sizeof x);
        return x;
    }
    static INLINE void store(float* to, V x) { std::memcpy(to, &x, sizeof x); }
};

struct Half {
    typedef uint16_t type;
    static INLINE H halves(const uint16_t* from) {
        H x;
        std::memcpy(&x, from, sizeof x);
        return x;
    }
    static INLINE void put(uint16_t* to, H x) { std::memcpy(to, &x, sizeof x); }
};

struct BFloat16 : Half {
    static constexpr bool FINE = false;
    static INLINE V load(const uint16_t* from) {
        return (V)(__builtin_convertvector(halves(from), U) << 16);
    }
    static INLINE H narrow(V x) {
        const U bits = (U)x;
        const U rounded = (bits + (0x7fffu + (bits >> 16 & 1u))) >> 16;
        const U chosen = x == x ? rounded : (bits >> 16 | 0x40u);
#if defined(__AVX2__) && !defined(__AVX512F__)
        const __m128i low = _mm256_castsi256_si128((__m256i)chosen);
        return (H)_mm_packus_epi32(low, _mm256_extracti128_si256((__m256i)chosen, 1));
#else
        return __builtin_convertvector(chosen, H);
#endif
    }
    static INLINE void store(uint16_t* to, V x) { put(to, narrow(x)); }
};

struct Float16 : Half {
    static constexpr bool FINE = true;
#if defined(__AVX512F__)
    static INLINE V load(const uint16_t* from) { return (V)_mm512_cvtph_ps((__m256i)halves(from)); }
    static INLINE H narrow(V x) { return (H)_mm512_cvtps_ph((__m512)x, 0); }
#elif defined(__F16C__)
    static INLINE V load(const uint16_t* from) { return (V)_mm256_cvtph_ps((__m128i)halves(from)); }
    static INLINE H narrow(V x) { return (H)_mm256_cvtps_ph((__m256)x, 0); }
#else
    static INLINE V load(const uint16_t* from) {
        return __builtin_convertvector((F16V)halves(from), V);
    }
    static INLINE H narrow(V x) { return (H)__builtin_convertvector(x, F16V); }
#endif
    static INLINE void store(uint16_t* to, V x) { put(to, narrow(x)); }
};

// Horner's scheme: fewest operations, which is what bounds these loops; Estrin's took 8% longer.
template <int COUNT>
INLINE V polynomial(const float (&c)[COUNT], V x) {
    V total = all(c[COUNT - 1]);
#pragma GCC unroll 16
    for (int i = COUNT - 2; i >= 0; i--) total = total * x + c[i];
    return total;
}

// 2^x for -126 <= x <= 0.
template <bool FINE>
INLINE V exp2(V x) {
    const V biased = x + ROUND;
    const V f = x - (biased - ROUND);
    const V power = FINE ? polynomial(POWER_FINE, f) : polynomial(POWER_COARSE, f);
    return power * (V)((I)biased << 23);
}

// exp(scale x) - 1 without cancellation, as 2^n (2^f - 1) + (2^n - 1); |scale x| <= 80.
template <bool FINE>
INLINE V expm1(V x, float scale) {
    const V biased = x * (scale * LOG2E) + ROUND;
    const V f = x * (scale * LOG2E) - (biased - ROUND);
    const V growth = f * (FINE ? polynomial(GROWTH_FINE, f) : polynomial(GROWTH_COARSE, f));
    const V power = (V)((I)biased << 23);
    return power * growth + (power - 1.0f);
}

// What the basis is made of: max(x, 0), |x| (cut off), sigmoid(x), Phi(-|x|), tanh(x), as needed.
struct Parts {
    V x, positive, a, sigmoid, cdf, tanh;
};

template <unsigned MASK, bool FINE>
INLINE Parts parts(V x) {
    Parts p = {x, x, x, x, x, x};
    if (has(MASK, RELU) || has(MASK, RELU2)) p.positive = clamp_low(x, 0.0f);
    if (has(MASK, SILU) && has(MASK, TANH)) {
        // With e = exp(-x): sigmoid = 1 / (1 + e) and tanh = (1 - e^2) / (1 + e^2), one division.
        const V t = expm1<FINE>(clamp_high(clamp_low(x, -LARGEST_BOTH), LARGEST_BOTH), -1.0f);
        const V u = t + 2.0f, w = t * u, v = w + 2.0f;
        const V r = 1.0f / (u * v);
        p.sigmoid = v * r;
        p.tanh = -w * (u * r);
    } else if (has(MASK, SILU)) {
        const V t = expm1<FINE>(clamp_high(clamp_low(x, -LARGEST_ONE), LARGEST_ONE), -1.0f);
        p.sigmoid = 1.0f / (t + 2.0f);
    } else if (has(MASK, TANH)) {
        const V t = expm1<FINE>(clamp_high(clamp_low(x, -LARGEST_BOTH), LARGEST_BOTH), -2.0f);
        p.tanh = -t / (t + 2.0f);
    }
    if (has(MASK, TAIL)) {
        p.a = clamp_high(magnitude(x), LARGEST_TAIL);
        p.cdf = exp2<FINE>(FINE ? polynomial(TAIL_FINE, p.a) : polynomial(TAIL_COARSE, p.a));
    }
    return p;
}

// sum_j c_j b_j(x).
template <unsigned MASK>
INLINE V mixed(const V* c, const Parts& p) {
    V total = V{};
    if (has(MASK, X) && has(MASK, SILU)) total = p.x * (c[SILU] * p.sigmoid + c[X]);
    else if (has(MASK, X)) total = p.x * c[X];
    else if (has(MASK, SILU)) total = p.x * (c[SILU] * p.sigmoid);
    if (has(MASK, RELU) && has(MASK, RELU2))
        total += p.positive * (c[RELU2] * p.positive + c[RELU]);
    else if (has(MASK, RELU)) total += p.positive * c[RELU];
    else if (has(MASK, RELU2)) total += p.positive * (c[RELU2] * p.positive);
    if (has(MASK, TAIL)) total += p.a * (c[TAIL] * p.cdf);
    if (has(MASK, TANH)) total += c[TANH] * p.tanh;
    return total;
}

// a phi(a) - Phi(-a): the derivative of the tail, up to the sign of x.
template <bool FINE>
INLINE V tail_slope(const Parts& p) {
    return p.cdf * (FINE ? polynomial(SLOPE_FINE, p.a) : polynomial(SLOPE_COARSE, p.a));
}

// sum_j c_j b_j'(x); at 0 the derivative from the left, as PyTorch takes it.
template <unsigned MASK, bool FINE>
INLINE V mixed_slope(const V* c, const Parts& p) {
    V total = has(MASK, X) ? c[X] : V{};
    if (has(MASK, TANH)) total += c[TANH] * (1.0f - p.tanh * p.tanh);
    if (has(MASK, SILU)) total += c[SILU] * (p.sigmoid * (p.x - p.x * p.sigmoid) + p.sigmoid);
    if (has(MASK, RELU2)) total += (c[RELU2] + c[RELU2]) * p.positive;
    const I right = p.x > 0.0f;
    if (has(MASK, TAIL)) total += (right ? -c[TAIL] : c[TAIL]) * tail_slope<FINE>(p);
    if (has(MASK, RELU)) total += masked(right, c[RELU]);
    return total;
}

template <unsigned MASK>
INLINE void basis_values(const Parts& p, V* b) {
    const V values[BASIS] = {p.x, p.positive, p.positive * p.positive,
                             p.x * p.sigmoid, p.a * p.cdf, p.tanh};
    for (int j = 0; j < BASIS; j++) b[j] = has(MASK, j) ? values[j] : V{};
}

template <unsigned MASK, bool FINE>
INLINE void basis_slopes(const Parts& p, V* b) {
    const I right = p.x > 0.0f;
    const V odd = has(MASK, TAIL) ? tail_slope<FINE>(p) : V{};
    const V values[BASIS] = {all(1.0f), masked(right, all(1.0f)), p.positive + p.positive,
                             p.sigmoid * (p.x - p.x * p.sigmoid) + p.sigmoid,
                             right ? -odd : odd, 1.0f - p.tanh * p.tanh};
    for (int j = 0; j < BASIS; j++) b[j] = has(MASK, j) ? values[j] : V{};
}

// Values or slopes of the K activations from those of the basis.
INLINE void activations(const V* b, V (*to)[BLOCK], int i) {
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
        V total = V{};
#pragma GCC unroll 8
        for (int j = 0; j < BASIS; j++)
            if (MATRIX[k][j] != 0.0f) total += MATRIX[k][j] * b[j];
        to[k][i] = total;
    }
}

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

// Whole vectors are worked on in place; a remainder is copied to and from vectors padded by zeros.
struct Job {
    const void *grad, *preact;
    const float *logits, *token_weight;
    void* out;
    float *grad_logits, *grad_weight;
    int64_t width, grad_stride, preact_stride, logits_stride;
};

template <class D, bool BACKWARD>
INLINE void walk(const Job& job, int64_t r, const Row& row, Sums& sums) {
    typedef typename D::type T;
    constexpr bool GATED = MOA_VARIANT != TYPE1;
    const int64_t width = job.width, z_at = GATED ? width : 0;
    const T* source = (const T*)job.preact + r * job.preact_stride;
    const T* upstream = BACKWARD ? (const T*)job.grad + r * job.grad_stride : nullptr;
    T* target = (T*)job.out + r * (BACKWARD ? width + z_at : width);
    alignas(64) T in_y[W] = {}, in_z[W] = {}, in_g[W] = {}, out_y[W], out_z[W];
    for (int64_t at = 0, n; at < width; at += n) {
        const int64_t left = width - at;
        const bool whole = left >= W;
        n = !whole ? left : left >= BLOCK * W ? BLOCK * W : left / W * W;
        const T *y = source + at, *z = y + z_at, *g = upstream + (BACKWARD ? at : 0);
        T *to_y = target + at, *to_z = to_y + z_at;
        if (!whole) {
            std::memcpy(in_y, y, n * sizeof(T));
            std::memcpy(in_z, z, n * sizeof(T));
            if (BACKWARD) std::memcpy(in_g, g, n * sizeof(T));
            y = in_y, z = in_z, g = in_g, to_y = out_y, to_z = out_z;
        }
        const int count = whole ? n / W : 1;
        if (!BACKWARD) forward_block<D>(row, y, z, to_y, count);
        else if (MOA_VARIANT == QD)
            backward_pairs<D>(row, g, y, z, to_y, to_z, sums, count);
        else backward_block<D>(row, g, y, z, to_y, to_z, sums, count);
        if (!whole) {
            if (GATED || !BACKWARD) std::memcpy(target + at, out_y, n * sizeof(T));
            if (BACKWARD) std::memcpy(target + at + z_at, out_z, n * sizeof(T));
        }
    }
}

template <class D, bool BACKWARD>
void rows(const Job& job, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
        Row row;
        Sums sums = {};
        prepare(job.logits + r * job.logits_stride, job.token_weight ? job.token_weight[r] : 1.0f,
                row);
        walk<D, BACKWARD>(job, r, row, sums);
        if (BACKWARD)
            finish(row, sums, job.grad_logits + r * N,
                   job.token_weight ? job.grad_weight + r : nullptr);
    }
}

template <class D, bool BACKWARD>
void run(const Job& job, int64_t count, int threads) {
    if (count * job.width < PARALLEL_ELEMENTS) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        const int64_t team = omp_get_num_threads(), id = omp_get_thread_num();
        const int64_t first = count * id / team, last = count * (id + 1) / team;
        rows<D, BACKWARD>(job, first, last);
    }
}

template <bool BACKWARD>
void dispatch(const Job& job, int64_t count, int dtype, int threads) {
    if (dtype == 0) run<Float32, BACKWARD>(job, count, threads);
    else if (dtype == 1) run<BFloat16, BACKWARD>(job, count, threads);
    else run<Float16, BACKWARD>(job, count, threads);
}
}  // namespace

// dtype: 0 float32, 1 bfloat16, 2 float16; strides in elements; token_weight may be null.
extern "C" void moa_forward(const void* preact, int64_t preact_stride, const float* logits,
                            int64_t logits_stride, const float* token_weight, void* hidden,
                            int64_t count, int64_t width, int dtype, int threads) {
    const Job job = {nullptr, preact, logits, token_weight, hidden, nullptr, nullptr,
                     width, 0, preact_stride, logits_stride};
    dispatch<false>(job, count, dtype, threads);
}

// grad_logits: [count, N], of every row even where all share coefficients; grad_weight: [count].
extern "C" void moa_backward(const void* grad, int64_t grad_stride, const void* preact,
                             int64_t preact_stride, const float* logits, int64_t logits_stride,
                             const float* token_weight, void* grad_preact, float* grad_logits,
                             float* grad_weight, int64_t count, int64_t width, int dtype,
                             int threads) {
    const Job job = {grad, preact, logits, token_weight, grad_preact, grad_logits, grad_weight,
                     width, grad_stride, preact_stride, logits_stride};
    dispatch<true>(job, count, dtype, threads);
}

// Sum over rows of [count, N], one after the other: the same for every number of threads.
extern "C" void moa_sum_rows(const float* from, float* to, int64_t count) {
    double total[N] = {};
    for (int64_t r = 0; r < count; r++)
        for (int k = 0; k < N; k++) total[k] += from[r * N + k];
    for (int k = 0; k < N; k++) to[k] = total[k];
}
