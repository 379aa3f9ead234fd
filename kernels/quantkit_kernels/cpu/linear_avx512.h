// AVX-512 VNNI on whole units: shared by the avx512 path and, for few tokens, by the amx path.
// The intrinsics come from <immintrin.h>, or from emulate.h on a machine without them.
#pragma once

#include <type_traits>

#include "tables_avx512.h"

namespace qk {
namespace {

struct Whole {  // a line of 64 bytes
    using type = __m512i;
    static type load(const uint8_t *from) { return _mm512_loadu_si512(from); }
    static type right(type v, int n) { return _mm512_srli_epi32(v, unsigned(n)); }
    static type left(type v, int n) { return _mm512_slli_epi32(v, unsigned(n)); }
    static type bits(type v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8(char(mask))); }
    static type either(type v, type o) { return _mm512_or_si512(v, o); }
};

inline __m512i four_bytes_everywhere(const char *x) {
    int32_t value;
    std::memcpy(&value, x, 4);
    return _mm512_set1_epi32(value);
}

inline __m512i unit_zeros(const Unit &u) {
    return _mm512_cvtps_epi32(sixteen_halves(u.scales + (u.wide ? 64 : 32)));
}

// acc[16] += (sum - z total) (s_w s_a).
inline void scale_and_add(__m512i sum, __m512i zero, __m512 scale, int32_t total, float token_scale, float *acc) {
    const __m512i offset = _mm512_mullo_epi32(zero, _mm512_set1_epi32(total));
    const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, offset));
    const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(token_scale));
    _mm512_storeu_ps(acc, _mm512_add_ps(_mm512_loadu_ps(acc), _mm512_mul_ps(exact, both)));
}

// 32 columns and T rows of activations into sum.
template <int BITS, int KIND, int T>
QK_INLINE void add_columns(const uint8_t *codes, int columns, int c, const char *const *x, __m512i (&sum)[T]) {
    constexpr int SIZE = KIND == A8 ? 1 : 2;
QK_UNROLL(8)
    for (int q = 0; q < 8; ++q) {
        const __m512i code = quad<BITS, Whole>(codes, columns, c, q, 0);
        if constexpr (KIND == A8) {
QK_UNROLL(8)
            for (int t = 0; t < T; ++t)
                sum[t] = _mm512_dpbusd_epi32(sum[t], code, four_bytes_everywhere(x[t] + c * 32 + q * 4));
        } else {
            const __m512i even = _mm512_and_si512(code, _mm512_set1_epi32(0x00ff00ff));
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(code, 8), _mm512_set1_epi32(0x00ff00ff));
QK_UNROLL(8)
            for (int t = 0; t < T; ++t) {
                const char *at = x[t] + (c * 32 + q * 4) * SIZE;
                sum[t] = _mm512_dpwssd_epi32(sum[t], even, four_bytes_everywhere(at));
                sum[t] = _mm512_dpwssd_epi32(sum[t], odd, four_bytes_everywhere(at + 4));
            }
        }
    }
}

// Scales of group `part` of FP4; of 4 groups, times 2^-8.
inline __m512 part_scales(const Unit &u, int part) {
    if (u.wide) return _mm512_loadu_ps(u.scales + 64 * part);
    if (u.parts < 4) return sixteen_halves(u.scales + 32 * part);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(u.scales + 16 * part));
    return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 7));
}

// T rows of activations over a unit of FP4 whose groups have LINES lines each.
template <int T, int LINES>
QK_INLINE void fp4_groups(const Unit &u, const Activations &a, int i, int64_t row, float *acc) {
    alignas(64) int8_t four_times[64];
    for (int j = 0; j < 64; ++j) four_times[j] = FP4_TWICE[j % 16];
    const __m512i table = _mm512_loadu_si512(four_times);
    const int64_t at = i * a.rows + row;
QK_UNROLL(1)
    for (int part = 0; part < u.parts; ++part) {
        __m512i sum[T];
        for (int t = 0; t < T; ++t) sum[t] = _mm512_setzero_si512();
QK_UNROLL(8)
        for (int l = 0; l < LINES; ++l) {
            const int line = part * LINES + l;
            const __m512i raw = Whole::load(u.codes + line * 64);
QK_UNROLL(2)
            for (int nibble = 0; nibble < 2; ++nibble) {
                const __m512i index = Whole::bits(nibble ? Whole::right(raw, 4) : raw, 15);
                const __m512i value = _mm512_shuffle_epi8(table, index);
                const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(value, 8), 8);
                const __m512i odd = _mm512_srai_epi16(value, 8);
QK_UNROLL(8)
                for (int t = 0; t < T; ++t) {
                    const char *x = a.at<A16>(row + t, i) + line * 16 + nibble * 8;
                    sum[t] = _mm512_dpwssd_epi32(sum[t], even, four_bytes_everywhere(x));
                    sum[t] = _mm512_dpwssd_epi32(sum[t], odd, four_bytes_everywhere(x + 4));
                }
            }
        }
        const __m512 scale = part_scales(u, part);
        for (int t = 0; t < T; ++t) {
            const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(a.scale[at + t]));
            float *to = acc + t * ROWS;
            const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[t]), both);
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), product));
        }
    }
}

template <int T>
QK_INLINE void fp4_unit(const Unit &u, const Activations &a, int i, int64_t row, float *acc) {
    switch (a.columns / u.parts) {
        case 16: return fp4_groups<T, 2>(u, a, i, row, acc);
        case 32: return fp4_groups<T, 4>(u, a, i, row, acc);
        case 64: return fp4_groups<T, 8>(u, a, i, row, acc);
        default: return fp4_groups<T, 16>(u, a, i, row, acc);
    }
}

// T rows of activations over a unit of C columns, all unrolled; C = 0: as many as `a` says, in a loop.
template <int BITS, int KIND, int T, int C>
QK_INLINE void sum_and_scale(const Unit &u, const Activations &a, int i, int64_t row, float *acc) {
    const char *x[T];
    __m512i sum[T];
QK_UNROLL(8)
    for (int t = 0; t < T; ++t) {
        x[t] = a.at<KIND, C>(row + t, i);
        sum[t] = _mm512_setzero_si512();
    }
    if constexpr (C > 0) {
QK_UNROLL(4)
        for (int c = 0; c < C / 32; ++c) add_columns<BITS, KIND, T>(u.codes, C, c, x, sum);
    } else {
QK_UNROLL(1)
        for (int c = 0; c < a.columns / 32; ++c) add_columns<BITS, KIND, T>(u.codes, a.columns, c, x, sum);
    }
    const __m512i zero = unit_zeros(u);
    const __m512 scale = unit_scales(u);
    const int64_t at = i * a.rows + row;
QK_UNROLL(8)
    for (int t = 0; t < T; ++t) scale_and_add(sum[t], zero, scale, a.sum[at + t], a.scale[at + t], acc + t * ROWS);
}

struct Vnni {
    static constexpr bool TILES = false;
    template <int BITS, int KIND, int C>
    static void rows(const Unit &u, const Activations &a, int i, int64_t r0, int64_t r1, float *acc) {
        if constexpr (KIND == A32)
            table_rows<std::conditional_t<BITS == 8, Fp8Sixteens, Nf4Sixteens>>(u, a, i, r0, r1, acc);
        else
            rows_in_turn<Vnni, BITS, KIND, C, 8>(u, a, i, r0, r1, acc);
    }

    template <int BITS, int KIND, int C>
    QK_INLINE static void one(const Unit &u, const Activations &a, int i, int64_t row, float *acc) {
        if constexpr (BITS == E2M1)
            fp4_unit<1>(u, a, i, row, acc);
        else
            sum_and_scale<BITS, KIND, 1, C>(u, a, i, row, acc);
    }

    template <int BITS, int KIND, int T>
    QK_APART static void some(const Unit &u, const Activations &a, int i, int64_t row, float *acc) {
        if constexpr (BITS == E2M1)
            fp4_unit<T>(u, a, i, row, acc);
        else
            sum_and_scale<BITS, KIND, T, 0>(u, a, i, row, acc);
    }
};

}  // namespace
}  // namespace qk
