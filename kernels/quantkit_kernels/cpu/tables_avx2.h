// Codes of tables to fp32 with AVX2; see tables.h. Included by linear_avx2.cpp.
#pragma once

#include <immintrin.h>

#include "tables.h"

namespace qk {
namespace {

struct Eights {  // vectors of eight floats
    using Vector = __m256;
    static constexpr int LANES = 8;
    static Vector zero() { return _mm256_setzero_ps(); }
    static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
    static Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
    static Vector load_floats(const float *from) { return _mm256_loadu_ps(from); }
    static void store(float *to, Vector v) { _mm256_storeu_ps(to, v); }

    static __m256i half_line(const uint8_t *codes, int half) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes) + half);
    }
    static __m256 halves(const uint8_t *from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    }
    static __m256 scales(const Unit &u, int half) {
        return u.wide ? _mm256_loadu_ps(reinterpret_cast<const float *>(u.scales) + 8 * half)
                      : halves(u.scales + 16 * half);
    }
};

// A step is one column of 16 rows, lanes are rows.
struct Nf4Eights : Eights {
    static constexpr int BITS = 4, BANDS = 1, STEPS = 8, PARTS = 2, OPERAND = 1, DECODED = 4, TOKENS = 6;
    struct Line {
        __m256i half[2];
    };
    __m256 low, high;

    Nf4Eights() : low(_mm256_loadu_ps(table_values(NF4))), high(_mm256_loadu_ps(table_values(NF4) + 8)) {}
    static Line load(const uint8_t *codes, int line, int) {
        return {{half_line(codes, 2 * line), half_line(codes, 2 * line + 1)}};
    }
    static Vector broadcast(const float *x) { return _mm256_broadcast_ss(x); }
    // The permutation looks at three bits of a lane, the blend at its sign.
    void decode(const Line &line, int step, Vector *value) const {
        const int shift = step % 4 * 8 + step / 4 * 4;
        for (int h = 0; h < 2; ++h) {
            const __m256i index = _mm256_srli_epi32(line.half[h], shift);
            const __m256 bit = _mm256_castsi256_ps(_mm256_slli_epi32(line.half[h], 28 - shift));
            const __m256 below = _mm256_permutevar8x32_ps(low, index), above = _mm256_permutevar8x32_ps(high, index);
            value[h] = _mm256_blendv_ps(below, above, bit);
        }
    }
    static void rows(const Vector (&sum)[2], Vector (&out)[2]) { out[0] = sum[0], out[1] = sum[1]; }
};

// A step is the even or the odd columns of four, as fp16 times 2^-8, whose conversion takes subnormals too: a
// vector is four rows by two columns. NaN codes come with the scales.
struct Fp8Eights : Eights {
    static constexpr int BITS = 8, BANDS = 2, STEPS = 2, PARTS = 2, OPERAND = 2, DECODED = 6, TOKENS = 6;
    using Line = __m256i;

    Fp8Eights() {}
    static Line load(const uint8_t *codes, int line, int band) { return half_line(codes, 2 * line + band); }
    static Vector broadcast(const float *x) {
        double pair;
        std::memcpy(&pair, x, 8);
        return _mm256_castpd_ps(_mm256_set1_pd(pair));
    }
    void decode(Line line, int step, Vector *value) const {
        const __m256i top = step ? line : _mm256_slli_epi16(line, 8);
        const __m256i half = _mm256_and_si256(_mm256_srai_epi16(top, 1), _mm256_set1_epi16(int16_t(0xbf80)));
        value[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
        value[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
    }
    static Vector scales(const Unit &u, int half) {
        const __m256 nan_or_zero = halves(u.scales + (u.wide ? 64 : 32) + 16 * half);
        return _mm256_fmadd_ps(Eights::scales(u, half), _mm256_set1_ps(256.f), nan_or_zero);
    }
    static void rows(const Vector (&sum)[2], Vector (&out)[1]) {  // rows 0 1 4 5, 2 3 6 7
        const __m256d pairs = _mm256_castps_pd(_mm256_hadd_ps(sum[0], sum[1]));
        out[0] = _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xd8));
    }
};

}  // namespace
}  // namespace qk
