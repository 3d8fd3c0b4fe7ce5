// Forward and backward of the mixture on a CPU: one pass over memory each.
//
// Compiled once per MoAConfig by cpu_op.py, which defines
//   MOA_VARIANT  0 type1, 1 one, 2 bi, 3 qd        MOA_GATE  0 sigmoid, 1 tanh, 2 softmax, 3 none
//   MOA_K        size of the dictionary            MOA_MATRIX  its K rows in the basis of basis.py
//   MOA_TAIL_FINE, MOA_TAIL_COARSE                 log2 Phi(-a), lowest power first
// A row is walked in blocks that stay in the first cache: the functions of z into buffers, then
// those of y, then the sums, so that each loop fits the registers. All arithmetic is float32. A row
// never meets another, so the number of threads changes nothing.

#include <omp.h>

#include "cpu_blocks.h"

namespace {

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
