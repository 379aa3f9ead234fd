// GPTQ's two loops over a block of columns: what each column's rounding does to the columns after it.
//
// A strip of LANES rows of the weight goes through all columns of the block before the next strip, so that what a
// column needs of those before it stays in the first-level cache. Sums are added in the order of the columns, without
// fused multiply-add: every instruction set gives the same bits.
#include "quantkit_cpu.h"

namespace {

constexpr float MAGIC = 12582912.f;  // 1.5 * 2^23: adding it to |x| < 2^22 rounds to an integer, ties to even
constexpr int LANES = 32;            // rows of the weight in a strip

#define QK_INLINE static inline __attribute__((always_inline))

// The integer nearest to x, ties to even, within low..high; a NaN stays one.
QK_INLINE float nearest(float x, float low, float high) {
    x = x < low ? low : x;
    x = x > high ? high : x;
    return (x + MAGIC) - MAGIC;
}

// A strip: where its first row lies in the tensors of its weight, and how many rows it has.
struct Strip {
    const float *value, *gradient, *matrix, *scale, *low, *high;
    float *first_out, *second_out;
    const int32_t *group_of;
    int64_t rows;
};

QK_INLINE Strip strip_at(const qk_columns *c, int64_t number) {
    const int64_t strips = (c->rows + LANES - 1) / LANES, e = number / strips, at = number % strips * LANES;
    const int64_t grid = e * c->groups * c->rows + at, left = c->rows - at;
    Strip s{};
    s.value = c->value + e * c->each + at;
    s.gradient = c->gradient ? c->gradient + e * c->gradient_each + at : nullptr;
    s.matrix = c->matrix + e * c->columns * c->columns;
    s.scale = c->scale + grid;
    s.low = c->low + grid;
    s.high = c->high + grid;
    s.first_out = c->first_out + e * c->each + at;
    s.second_out = c->second_out ? c->second_out + e * c->each + at : nullptr;
    s.group_of = c->group_of + e * c->columns;
    s.rows = left < LANES ? left : LANES;
    return s;
}

QK_INLINE void take(float *to, const float *from, int64_t count, float rest) {
    if (count == LANES) {
        for (int i = 0; i < LANES; ++i) to[i] = from[i];
    } else {
        for (int i = 0; i < LANES; ++i) to[i] = i < count ? from[i] : rest;
    }
}

QK_INLINE void give(float *to, const float *from, int64_t count) {
    if (count == LANES) {
        for (int i = 0; i < LANES; ++i) to[i] = from[i];
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    }
}

// x - sum over earlier columns of matrix[j][i] * done[i].
QK_INLINE void without(float *x, const float *matrix, const float (*done)[LANES], int64_t j) {
    for (int64_t i = 0; i < j; ++i) {
        const float m = matrix[i];
        for (int lane = 0; lane < LANES; ++lane) x[lane] -= m * done[i][lane];
    }
}

QK_INLINE void spread(const qk_columns *c, int64_t first, int64_t last) {
    float errors[QK_MOST_COLUMNS][LANES];
    for (int64_t number = first; number < last; ++number) {
        const Strip s = strip_at(c, number);
        for (int64_t j = 0; j < c->columns; ++j) {
            const float *row = s.matrix + j * c->columns, pivot = row[j];
            const int64_t g = s.group_of[j] * c->rows;
            float w[LANES], scale[LANES], low[LANES], high[LANES], level[LANES];
            take(w, s.value + j * c->row, s.rows, 0);
            without(w, row, errors, j);
            take(scale, s.scale + g, s.rows, 1);
            take(low, s.low + g, s.rows, 0);
            take(high, s.high + g, s.rows, 0);
            for (int i = 0; i < LANES; ++i) {
                level[i] = nearest(w[i] / scale[i], low[i], high[i]);
                errors[j][i] = (w[i] - level[i] * scale[i]) / pivot;
            }
            give(s.first_out + j * c->row, level, s.rows);
            give(s.second_out + j * c->row, errors[j], s.rows);
        }
    }
}

QK_INLINE void descend(const qk_columns *c, int64_t first, int64_t last) {
    float moves[QK_MOST_COLUMNS][LANES];  // new - old
    for (int64_t number = first; number < last; ++number) {
        const Strip s = strip_at(c, number);
        for (int64_t j = 0; j < c->columns; ++j) {
            const float *row = s.matrix + j * c->columns, step = 1.f / row[j];
            const int64_t g = s.group_of[j] * c->rows;
            float gradient[LANES], old[LANES], scale[LANES], low[LANES], high[LANES], now[LANES];
            take(gradient, s.gradient + j * c->gradient_row, s.rows, 0);
            without(gradient, row, moves, j);
            take(old, s.value + j * c->row, s.rows, 0);
            take(scale, s.scale + g, s.rows, 1);
            take(low, s.low + g, s.rows, 0);
            take(high, s.high + g, s.rows, 0);
            for (int i = 0; i < LANES; ++i) {
                const float wanted = old[i] + gradient[i] * step;
                now[i] = nearest(wanted / scale[i], low[i], high[i]) * scale[i];
                moves[j][i] = now[i] - old[i];
            }
            give(s.first_out + j * c->row, now, s.rows);
        }
    }
}

void spread_portable(const qk_columns *c, int64_t first, int64_t last) { spread(c, first, last); }
void descend_portable(const qk_columns *c, int64_t first, int64_t last) { descend(c, first, last); }

#if defined(__x86_64__) && !defined(QK_EMULATE)
enum { AVX2 = 1, AVX512 = 2 };  // of qk_isa
#define QK_TARGETED(name)                                                                                     \
    __attribute__((target("avx2"))) void name##_avx2(const qk_columns *c, int64_t first, int64_t last) {      \
        name(c, first, last);                                                                                 \
    }                                                                                                         \
    __attribute__((target("avx512f"))) void name##_avx512(const qk_columns *c, int64_t first, int64_t last) { \
        name(c, first, last);                                                                                 \
    }
QK_TARGETED(spread)
QK_TARGETED(descend)
#define QK_PATH(name) (qk_isa() >= AVX512 ? name##_avx512 : qk_isa() == AVX2 ? name##_avx2 : name##_portable)
#else
#define QK_PATH(name) name##_portable
#endif

void in_parts(void (*run)(const qk_columns *, int64_t, int64_t), const qk_columns *c, int threads) {
    const int64_t strips = c->weights * ((c->rows + LANES - 1) / LANES);
    const int64_t work = c->weights * c->rows * c->columns * c->columns;
    const int parts = work < (1 << 18) || threads < 1 ? 1 : threads;
    if (parts == 1) return run(c, 0, strips);
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int part = 0; part < parts; ++part) run(c, strips * part / parts, strips * (part + 1) / parts);
}

}  // namespace

extern "C" void qk_spread(const qk_columns *c, int threads) { in_parts(QK_PATH(spread), c, threads); }

extern "C" void qk_descend(const qk_columns *c, int threads) { in_parts(QK_PATH(descend), c, threads); }
