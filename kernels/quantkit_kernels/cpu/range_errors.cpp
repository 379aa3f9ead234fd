// How well each of several grids would round a group of weights: the range search's first look at its candidates.
//
// The errors are approximate: w is multiplied by 1 / s instead of divided by s, and sums are added in the order that
// suits the vectors. Who needs the last bit decides among the best few exactly.
#include <cmath>

#include "quantkit_cpu.h"

namespace {

constexpr float MAGIC = 12582912.f;  // 1.5 * 2^23: adding it to |x| < 2^22 rounds to an integer, ties to even
constexpr float LEAST_CUT = 0.01f;   // in steps; of a smaller cut too few bits are left
constexpr float SURE = 0.95f;        // a bound is taken so much lower, for rounding

#define QK_INLINE static inline __attribute__((always_inline))

QK_INLINE float clamp(float x, float low, float high) {
    x = x < low ? low : x;  // a NaN stays one
    return x > high ? high : x;
}

// x^2.5 for x >= 0.
QK_INLINE float power(float x) { return x * x * std::sqrt(x); }

struct Candidate {
    float inverse, low, high;  // 1 / s, and the lowest and the highest level
};

QK_INLINE float sum_of_powers(const float *w, int64_t group, Candidate c) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < group; ++i) {
        const float x = w[i] * c.inverse;
        const float off = (clamp(x, c.low, c.high) + MAGIC) - MAGIC - x;
        sum += off * off * std::sqrt(std::fabs(off));
    }
    return sum;
}

QK_INLINE float sum_of_squares(const float *w, const float *column, int64_t group, Candidate c) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < group; ++i) {
        const float x = w[i] * c.inverse;
        const float off = (clamp(x, c.low, c.high) + MAGIC) - MAGIC - x;
        sum += off * off * column[i];
    }
    return sum;
}

// One group after the other, so that its weights are read once and stay in the first-level cache.
QK_INLINE void errors(const qk_range *r, int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
        const float *w = r->w + g * r->group;
        const float *column = r->column ? r->column + g % r->column_groups * r->group : nullptr;
        float lowest = w[0], highest = w[0], least = INFINITY;
#pragma omp simd reduction(min : lowest) reduction(max : highest)
        for (int64_t i = 0; i < r->group; ++i) {
            lowest = w[i] < lowest ? w[i] : lowest;
            highest = w[i] > highest ? w[i] : highest;
        }
        for (int64_t c = 0; c < r->candidates; ++c) {
            const int64_t at = c * r->groups + g;
            const float s = r->scale[at];
            const Candidate candidate{1.f / s, -r->zero[at], r->qmax - r->zero[at]};
            float error;
            if (column) {
                error = sum_of_squares(w, column, r->group, candidate) * (s * s);
            } else {
                const float above = highest * candidate.inverse - candidate.high;
                const float below = candidate.low - lowest * candidate.inverse;
                const float cut = above > below ? above : below;
                error = cut > LEAST_CUT ? SURE * power(cut) * power(s) : 0;
                if (!(error > least)) error = sum_of_powers(w, r->group, candidate) * power(s);
            }
            if (error < least) least = error;
            r->error[at] = error;
        }
    }
}

void errors_portable(const qk_range *r, int64_t first, int64_t last) { errors(r, first, last); }

#if defined(__x86_64__) && !defined(QK_EMULATE)
enum { AVX2 = 1, AVX512 = 2 };  // of qk_isa

__attribute__((target("avx2"))) void errors_avx2(const qk_range *r, int64_t first, int64_t last) {
    errors(r, first, last);
}
__attribute__((target("avx512f"))) void errors_avx512(const qk_range *r, int64_t first, int64_t last) {
    errors(r, first, last);
}
#endif

}  // namespace

extern "C" void qk_range_errors(const qk_range *r, int threads) {
    auto *run = errors_portable;
#if defined(__x86_64__) && !defined(QK_EMULATE)
    if (qk_isa() >= AVX512)
        run = errors_avx512;
    else if (qk_isa() == AVX2)
        run = errors_avx2;
#endif
    const int64_t work = r->groups * r->group * r->candidates;
    const int parts = work < (1 << 18) || threads < 1 ? 1 : threads;
    if (parts == 1) return run(r, 0, r->groups);
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int part = 0; part < parts; ++part) run(r, r->groups * part / parts, r->groups * (part + 1) / parts);
}
