// Codes of tables to fp32 with AVX-512; see tables.h. The intrinsics come from <immintrin.h> or emulate.h.
#pragma once

#include "tables.h"

#if defined(__GNUC__) && !defined(__clang__)  // gcc 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace qk {
namespace {

inline __m512 sixteen_halves(const uint8_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

inline __m512 unit_scales(const Unit &u) { return u.wide ? _mm512_loadu_ps(u.scales) : sixteen_halves(u.scales); }

struct Sixteens {  // vectors of sixteen floats
    using Vector = __m512;
    using Line = __m512i;
    static constexpr int LANES = 16, BANDS = 1;
    static Vector zero() { return _mm512_setzero_ps(); }
    static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
    static Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
    static Vector load_floats(const float *from) { return _mm512_loadu_ps(from); }
    static void store(float *to, Vector v) { _mm512_storeu_ps(to, v); }
    static Line load(const uint8_t *codes, int line, int) { return _mm512_loadu_si512(codes + 64 * line); }
    static Vector scales(const Unit &u, int) { return unit_scales(u); }
};

// A step is one column of 16 rows.
struct Nf4Sixteens : Sixteens {
    static constexpr int BITS = 4, STEPS = 8, PARTS = 1, OPERAND = 1, DECODED = 8, TOKENS = 8;
    __m512 table;

    Nf4Sixteens() : table(_mm512_loadu_ps(table_values(NF4))) {}
    static Vector broadcast(const float *x) { return _mm512_set1_ps(*x); }
    // The permutation looks at four bits of a lane.
    void decode(Line line, int step, Vector *value) const {
        value[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(line, unsigned(step % 4 * 8 + step / 4 * 4)), table);
    }
    static void rows(const Vector (&sum)[1], Vector (&out)[1]) { out[0] = sum[0]; }
};

// A step is the even or the odd columns of four, as fp16 times 2^-8, whose conversion takes subnormals too: a vector is
// eight rows by two columns. NaN codes come with the scales.
struct Fp8Sixteens : Sixteens {
    static constexpr int BITS = 8, STEPS = 2, PARTS = 2, OPERAND = 2, DECODED = 8, TOKENS = 8;

    Fp8Sixteens() {}
    static Vector broadcast(const float *x) {
        int64_t pair;
        std::memcpy(&pair, x, 8);
        return _mm512_castsi512_ps(_mm512_set1_epi64(pair));
    }
    void decode(Line line, int step, Vector *value) const {
        const __m512i top = step ? line : _mm512_slli_epi16(line, 8);
        const __m512i half = _mm512_and_si512(_mm512_srai_epi16(top, 1), _mm512_set1_epi32(int(0xbf80bf80)));
        value[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
        value[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
    }
    static Vector scales(const Unit &u, int) {
        return _mm512_fmadd_ps(unit_scales(u), _mm512_set1_ps(256.f), sixteen_halves(u.scales + (u.wide ? 64 : 32)));
    }
    static void rows(const Vector (&sum)[2], Vector (&out)[1]) {
        alignas(64) int32_t even[16], odd[16];
        for (int r = 0; r < 16; ++r) even[r] = 2 * r, odd[r] = 2 * r + 1;
        const __m512 low = _mm512_permutex2var_ps(sum[0], _mm512_loadu_si512(even), sum[1]);
        const __m512 high = _mm512_permutex2var_ps(sum[0], _mm512_loadu_si512(odd), sum[1]);
        out[0] = _mm512_add_ps(low, high);
    }
};

}  // namespace
}  // namespace qk
