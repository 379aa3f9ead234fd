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

    struct Line {
        __m256i half[2];
    };
    static Line load(const uint8_t *codes, int line) {
        const auto *from = reinterpret_cast<const __m256i *>(codes) + 2 * line;
        return {{_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)}};
    }

    static __m256 halves(const uint8_t *from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    }
    struct Scales {
        __m256 half[2];
        explicit Scales(const Unit &u) {
            for (int h = 0; h < 2; ++h)
                half[h] = u.wide ? _mm256_loadu_ps(reinterpret_cast<const float *>(u.scales) + 8 * h)
                                 : halves(u.scales + 16 * h);
        }
    };
    static void add_rows(const __m256 (&sum)[2], const Scales &scales, float *acc) {
        for (int h = 0; h < 2; ++h)
            _mm256_storeu_ps(acc + 8 * h, _mm256_fmadd_ps(sum[h], scales.half[h], _mm256_loadu_ps(acc + 8 * h)));
    }
};

// A step is one column of 16 rows.
struct Nf4Eights : Eights {
    static constexpr int BITS = 4, STEPS = 8, PARTS = 2, OPERAND = 1, DECODED = 4, TOKENS = 6;
    __m256 low, high;

    Nf4Eights() : low(_mm256_loadu_ps(table_values(NF4))), high(_mm256_loadu_ps(table_values(NF4) + 8)) {}
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
    static void scale_and_add(const Vector (&sum)[2], const Scales &scales, float *acc) { add_rows(sum, scales, acc); }
};

// A step is the even or the odd columns of four, as fp16 times 2^-8, whose conversion takes subnormals too: a vector is
// four rows by two columns. NaN codes come with the scales.
struct Fp8Eights : Eights {
    static constexpr int BITS = 8, STEPS = 2, PARTS = 4, OPERAND = 2, DECODED = 2, TOKENS = 3;

    Fp8Eights() {}
    static Vector broadcast(const float *x) {
        double pair;
        std::memcpy(&pair, x, 8);
        return _mm256_castpd_ps(_mm256_set1_pd(pair));
    }
    void decode(const Line &line, int step, Vector *value) const {
        for (int h = 0; h < 2; ++h) {
            const __m256i top = step ? line.half[h] : _mm256_slli_epi16(line.half[h], 8);
            const __m256i half = _mm256_and_si256(_mm256_srai_epi16(top, 1), _mm256_set1_epi16(int16_t(0xbf80)));
            value[2 * h] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
            value[2 * h + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
        }
    }
    struct Scales : Eights::Scales {
        explicit Scales(const Unit &u) : Eights::Scales(u) {
            const uint8_t *zeros = u.scales + (u.wide ? 64 : 32);
            for (int h = 0; h < 2; ++h)
                half[h] = _mm256_fmadd_ps(half[h], _mm256_set1_ps(256.f), halves(zeros + 16 * h));
        }
    };
    static void scale_and_add(const Vector (&sum)[4], const Scales &scales, float *acc) {
        __m256 rows[2];
        for (int h = 0; h < 2; ++h) {  // rows 0 1 4 5, 2 3 6 7
            const __m256d pairs = _mm256_castps_pd(_mm256_hadd_ps(sum[2 * h], sum[2 * h + 1]));
            rows[h] = _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xd8));
        }
        add_rows(rows, scales, acc);
    }
};

}  // namespace
}  // namespace qk
