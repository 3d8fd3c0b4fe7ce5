// Arithmetic of the CPU kernels: vectors, dtypes, the basis and its slopes. All in float32.
#pragma once

#include <cstdint>
#include <cstring>
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

}  // namespace
