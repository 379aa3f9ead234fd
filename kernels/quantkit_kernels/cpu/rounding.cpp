// Weights to codes on a given grid, and codes back to weights: the bits that torch gives.
//
// x = w / s is rounded to the nearest level of a format, ties to the even level (integers) or code (FP8, tables).
#include <cstring>

#include "half.h"
#include "quantkit_cpu.h"

namespace {

constexpr float MAGIC = 12582912.f;  // 1.5 * 2^23: adding it to |x| < 2^22 rounds to an integer, ties to even
constexpr float LARGEST = 448.f;     // of FP8 E4M3
constexpr int64_t BLOCK = 64;        // weights that are rounded at once

#define QK_INLINE static inline __attribute__((always_inline))

// A NaN becomes `low`.
QK_INLINE float clamp(float x, float low, float high) {
    x = x > low ? x : low;
    return x < high ? x : high;
}

// The code of FP8 E4M3: a sign, four bits of exponent, three of mantissa. No negative zero; a NaN stays one.
QK_INLINE uint32_t fp8_code(float x) {
    const uint32_t bits = qk::float_to_bits(x), sign = bits >> 24 & 0x80, own = bits & 0x7fffffff;
    const float magnitude = clamp(qk::bits_to_float(own), 0, LARGEST);
    const uint32_t m = qk::float_to_bits(magnitude);
    const uint32_t normal = ((m + 0x7ffff + (m >> 20 & 1)) >> 20) - (120 << 3);
    // Below 2^-6 levels are 2^-9 apart, as floats are from 2^14 on: the sum's last bits count them.
    const uint32_t small = qk::float_to_bits(magnitude + 16384.f) - qk::float_to_bits(16384.f);
    const uint32_t finite = magnitude < 0x1p-6f ? small : normal;
    const uint32_t code = int32_t(own) > 0x7f800000 ? 127 : finite;
    return code ? code | sign : 0;
}

// The next BLOCK weights, or fewer, of a row in units of their scales.
struct Block {
    float x[BLOCK], zero[BLOCK];
    int64_t count;
};

QK_INLINE void take(const qk_encoding *e, int64_t row, int64_t first, Block *b) {
    const int64_t groups = e->k / e->group, end = first + BLOCK < e->k ? first + BLOCK : e->k;
    b->count = end - first;
    if (b->count < BLOCK) *b = Block{{}, {}, b->count};
    for (int64_t from = first; from < end;) {
        const int64_t g = from / e->group, own = (g + 1) * e->group, to = own < end ? own : end;
        const float s = e->scale[row * groups + g], *w = e->w + row * e->k;
        if (to - from == BLOCK) {
            for (int64_t i = 0; i < BLOCK; ++i) b->x[i] = w[first + i] / s;
        } else {
            for (int64_t i = from; i < to; ++i) b->x[i - first] = w[i] / s;
        }
        if (e->zero) {
            for (int64_t i = from; i < to; ++i) b->zero[i - first] = e->zero[row * groups + g];
        }
        from = to;
    }
}

QK_INLINE void encode(const qk_encoding *e, int64_t first_row, int64_t last_row) {
    Block b{};
    uint8_t codes[BLOCK];
    for (int64_t row = first_row; row < last_row; ++row) {
        for (int64_t first = 0; first < e->k; first += BLOCK) {
            take(e, row, first, &b);
            if (e->kind == QK_ENCODE_FP8) {
                for (int i = 0; i < BLOCK; ++i) codes[i] = uint8_t(fp8_code(b.x[i]));
            } else if (e->kind == QK_ENCODE_INTEGERS) {
                for (int i = 0; i < BLOCK; ++i) {
                    const float level = (clamp(b.x[i], -b.zero[i], e->qmax - b.zero[i]) + MAGIC) - MAGIC;
                    codes[i] = uint8_t(int32_t(level + b.zero[i]));
                }
            } else {
                int32_t level[BLOCK] = {};
                for (int j = 0; j < e->levels - 1; ++j) {
                    const float edge = e->edges[j];
                    for (int i = 0; i < BLOCK; ++i) level[i] += !(b.x[i] <= edge);  // a NaN is above all
                }
                for (int i = 0; i < BLOCK; ++i) codes[i] = e->code_of[level[i]];
            }
            std::memcpy(e->codes + row * e->k + first, codes, b.count);
        }
    }
}

void encode_portable(const qk_encoding *e, int64_t first, int64_t last) { encode(e, first, last); }

#if defined(__x86_64__) && !defined(QK_EMULATE)
enum { AVX2 = 1, AVX512 = 2 };  // of qk_isa

__attribute__((target("avx2"))) void encode_avx2(const qk_encoding *e, int64_t first, int64_t last) {
    encode(e, first, last);
}
__attribute__((target("avx512f,avx512bw"))) void encode_avx512(const qk_encoding *e, int64_t first, int64_t last) {
    encode(e, first, last);
}
#endif

// A row of weights from its codes.
QK_INLINE void decode_row(const qk_decoding *d, int64_t row) {
    const int64_t groups = d->k / d->group;
    for (int64_t at = row * groups; at < (row + 1) * groups; ++at) {
        const uint8_t *codes = d->codes + at * d->group;
        float *w = d->w + at * d->group;
        const float s = d->scale[at];
        for (int64_t i = 0; i < d->group; ++i) w[i] = d->values[codes[i]] * s;
    }
}

// Row by row, so that the sums find it in the first-level cache.
QK_INLINE void decode(const qk_decoding *d, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        decode_row(d, row);
        if (!d->original) continue;
        const float *w = d->w + row * d->k, *original = d->original + row * d->k;
        float error = 0, norm = 0;
#pragma omp simd reduction(+ : error, norm)
        for (int64_t i = 0; i < d->k; ++i) {
            const float off = w[i] - original[i];
            error += off * off;
            norm += original[i] * original[i];
        }
        d->error[row] = error;
        d->norm[row] = norm;
    }
}

void decode_portable(const qk_decoding *d, int64_t first, int64_t last) { decode(d, first, last); }

#if defined(__x86_64__) && !defined(QK_EMULATE)
__attribute__((target("avx2"))) void decode_avx2(const qk_decoding *d, int64_t first, int64_t last) {
    decode(d, first, last);
}
__attribute__((target("avx512f,avx512bw"))) void decode_avx512(const qk_decoding *d, int64_t first, int64_t last) {
    decode(d, first, last);
}
#endif

template <class Facts> void in_parts(void (*run)(const Facts *, int64_t, int64_t), const Facts *facts, int threads) {
    const int parts = facts->n * facts->k < (1 << 18) || threads < 1 ? 1 : threads;
    if (parts == 1) return run(facts, 0, facts->n);
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int part = 0; part < parts; ++part) run(facts, facts->n * part / parts, facts->n * (part + 1) / parts);
}

}  // namespace

// The path of this machine, of a function that has all three.
#if defined(__x86_64__) && !defined(QK_EMULATE)
#define QK_PATH(name) (qk_isa() >= AVX512 ? name##_avx512 : qk_isa() == AVX2 ? name##_avx2 : name##_portable)
#else
#define QK_PATH(name) name##_portable
#endif

extern "C" void qk_encode(const qk_encoding *e, int threads) { in_parts(QK_PATH(encode), e, threads); }

extern "C" void qk_decode(const qk_decoding *d, int threads) { in_parts(QK_PATH(decode), d, threads); }
