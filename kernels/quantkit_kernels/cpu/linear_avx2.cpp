// AVX2: int8 activations through maddubs with 16-bit sums widened every 32 columns, int16 ones through madd.
//
// Up to four rows of activations go over whole lines. With four the 32-bit sums are spilled every 32 columns, which
// costs less than going over halves of the unit and broadcasting every activation twice.
#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "tables_avx2.h"

namespace qk {
namespace {

constexpr int H = 2;  // vectors of a line

struct Half {  // half a line
    using type = __m256i;
    static type load(const uint8_t *from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)); }
    static type right(type v, int n) { return _mm256_srli_epi32(v, n); }
    static type left(type v, int n) { return _mm256_slli_epi32(v, n); }
    static type bits(type v, int mask) { return _mm256_and_si256(v, _mm256_set1_epi8(char(mask))); }
    static type either(type v, type o) { return _mm256_or_si256(v, o); }
};

inline __m256i four_bytes(const char *x) {
    int32_t value;
    std::memcpy(&value, x, 4);
    return _mm256_set1_epi32(value);
}

// Sums stay in the order written: reassociated trees of them do not fit in the registers.
inline void pin(__m256i &v) { __asm__("" : "+x"(v)); }

// 32 columns of both halves and T rows of activations into sum.
template <int BITS, int KIND, int T>
QK_INLINE void add_columns(const uint8_t *codes, int columns, int c, const char *const *x,
                           __m256i (&sum)[H][T]) {
    constexpr int SIZE = KIND == A8 ? 1 : 2;
    const __m256i bytes = _mm256_set1_epi16(255);
    __m256i narrow[H][T], high[H][T];  // 16-bit sums; of the high nibbles
QK_UNROLL(8)
    for (int q = 0; q < 8; ++q) {
        __m256i code[H], upper[H];
        for (int h = 0; h < H; ++h) {
            code[h] = quad<BITS, Half>(codes, columns, c, q, h * 32);
            if (KIND == A8 && BITS == 8) {  // 255 * 128 twice would overflow
                upper[h] = Half::bits(Half::right(code[h], 4), 15);
                code[h] = Half::bits(code[h], 15);
            } else if (KIND == A16) {
                upper[h] = _mm256_srli_epi16(code[h], 8);
                code[h] = _mm256_and_si256(code[h], bytes);
            }
        }
        for (int t = 0; t < T; ++t) {
            const char *at = x[t] + (c * 32 + q * 4) * SIZE;
            const __m256i a = four_bytes(at);
            const __m256i odd = KIND == A16 ? four_bytes(at + 4) : a;
            for (int h = 0; h < H; ++h) {
                if constexpr (KIND == A16) {
                    sum[h][t] = _mm256_add_epi32(sum[h][t], _mm256_madd_epi16(code[h], a));
                    sum[h][t] = _mm256_add_epi32(sum[h][t], _mm256_madd_epi16(upper[h], odd));
                    pin(sum[h][t]);
                } else {
                    const __m256i product = _mm256_maddubs_epi16(code[h], a);
                    narrow[h][t] = q ? _mm256_add_epi16(narrow[h][t], product) : product;
                    pin(narrow[h][t]);
                    if constexpr (BITS == 8) {
                        const __m256i more = _mm256_maddubs_epi16(upper[h], a);
                        high[h][t] = q ? _mm256_add_epi16(high[h][t], more) : more;
                        pin(high[h][t]);
                    }
                }
            }
        }
    }
    if constexpr (KIND == A8) {  // 8 products of at most 2 * 15 * 128 fit in 16 bits
        for (int h = 0; h < H; ++h)
            for (int t = 0; t < T; ++t) {
                sum[h][t] = _mm256_add_epi32(sum[h][t], _mm256_madd_epi16(narrow[h][t], _mm256_set1_epi16(1)));
                if (BITS == 8)
                    sum[h][t] = _mm256_add_epi32(sum[h][t], _mm256_madd_epi16(high[h][t], _mm256_set1_epi16(16)));
            }
    }
}

// The same for one row of int16 and 4 bits: nibbles are multiplied where they lie, those 4 and 8 bits up have sums of
// their own, 16 and 256 times too large. 32 of 128 columns are 8 bits up: 32 * 15 * 256 * MOST16 fits in 32 bits.
QK_INLINE void add_columns_in_place(const uint8_t *codes, int c, const char *x, __m256i (&sum)[3][H]) {
QK_UNROLL(4)
    for (int line = c * 4; line < c * 4 + 4; ++line)
        for (int h = 0; h < H; ++h) {
            const __m256i code = Half::load(codes + line * 64 + h * 32);
            const auto add = [&](__m256i &to, __m256i part, int at) {
                to = _mm256_add_epi32(to, _mm256_madd_epi16(part, four_bytes(x + line * 16 + at)));
                pin(to);
            };
            add(sum[0][h], _mm256_and_si256(code, _mm256_set1_epi16(0x000f)), 0);
            add(sum[2][h], _mm256_and_si256(code, _mm256_set1_epi16(0x0f00)), 4);
            add(sum[1][h], _mm256_and_si256(code, _mm256_set1_epi16(0x00f0)), 8);
            add(sum[0][h], _mm256_srli_epi16(code, 12), 12);
        }
}

inline __m256 eight_halves(const uint8_t *from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}

// acc += (sum - z total) (s_w s_a) for rows 8 half .. 8 half + 7.
template <int T>
QK_INLINE void scale_and_add(const Unit &u, const Activations &a, int i, int64_t row, int half,
                             const __m256i (&sum)[T], float *acc) {
    const __m256 s = u.wide ? _mm256_loadu_ps(reinterpret_cast<const float *>(u.scales + 32 * half))
                            : eight_halves(u.scales + 16 * half);
    const __m256i z = _mm256_cvtps_epi32(eight_halves(u.scales + (u.wide ? 64 : 32) + 16 * half));
QK_UNROLL(4)
    for (int t = 0; t < T; ++t) {
        const __m256i total = _mm256_set1_epi32(a.sum[i * a.rows + row + t]);
        const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum[t], _mm256_mullo_epi32(z, total)));
        const __m256 scale = _mm256_mul_ps(s, _mm256_set1_ps(a.scale[i * a.rows + row + t]));
        float *to = acc + t * ROWS + 8 * half;
        _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), _mm256_mul_ps(exact, scale)));
    }
}

// Scales of group `part` of FP4, rows 8 half .. 8 half + 7; of 4 groups, times 2^-8.
inline __m256 part_scales(const Unit &u, int part, int half) {
    if (u.wide) return _mm256_loadu_ps(reinterpret_cast<const float *>(u.scales + 64 * part + 32 * half));
    if (u.parts < 4) return eight_halves(u.scales + 32 * part + 16 * half);
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(u.scales + 16 * part + 8 * half));
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 7));
}

// T rows of activations over a unit of FP4 whose groups have LINES lines each.
template <int T, int LINES>
QK_INLINE void fp4_groups(const Unit &u, const Activations &a, int i, int64_t row, float *acc) {
    const __m128i twice = _mm_load_si128(reinterpret_cast<const __m128i *>(FP4_TWICE));
    const __m256i table = _mm256_broadcastsi128_si256(twice);
QK_UNROLL(1)
    for (int part = 0; part < u.parts; ++part) {
        __m256i sum[H][T] = {};
QK_UNROLL(8)
        for (int l = 0; l < LINES; ++l) {
            const int line = part * LINES + l;
            const __m256i raw[H] = {Half::load(u.codes + line * 64), Half::load(u.codes + line * 64 + 32)};
QK_UNROLL(2)
            for (int nibble = 0; nibble < 2; ++nibble) {
                __m256i even[H], odd[H];
                for (int h = 0; h < H; ++h) {
                    const __m256i index = Half::bits(nibble ? _mm256_srli_epi16(raw[h], 4) : raw[h], 15);
                    const __m256i value = _mm256_shuffle_epi8(table, index);
                    even[h] = _mm256_srai_epi16(_mm256_slli_epi16(value, 8), 8);
                    odd[h] = _mm256_srai_epi16(value, 8);
                }
                for (int t = 0; t < T; ++t) {
                    const char *at = a.at<A16>(row + t, i) + line * 16 + nibble * 8;
                    const __m256i first = four_bytes(at), second = four_bytes(at + 4);
                    for (int h = 0; h < H; ++h) {
                        sum[h][t] = _mm256_add_epi32(sum[h][t], _mm256_madd_epi16(even[h], first));
                        sum[h][t] = _mm256_add_epi32(sum[h][t], _mm256_madd_epi16(odd[h], second));
                        pin(sum[h][t]);
                    }
                }
            }
        }
        for (int h = 0; h < H; ++h) {
            const __m256 s = part_scales(u, part, h);
            for (int t = 0; t < T; ++t) {
                const __m256 scale = _mm256_mul_ps(s, _mm256_set1_ps(a.scale[i * a.rows + row + t]));
                float *to = acc + t * ROWS + 8 * h;
                const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[h][t]), scale);
                _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), product));
            }
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
    __m256i sum[H][T];
QK_UNROLL(4)
    for (int t = 0; t < T; ++t) {
        x[t] = a.at<KIND, C>(row + t, i);
        sum[0][t] = sum[1][t] = _mm256_setzero_si256();
    }
    if constexpr (BITS == 4 && KIND == A16 && T == 1 && C > 0) {
        __m256i parts[3][H] = {};
QK_UNROLL(4)
        for (int c = 0; c < C / 32; ++c) add_columns_in_place(u.codes, c, x[0], parts);
        for (int h = 0; h < H; ++h) {
            const __m256i up = _mm256_srai_epi32(parts[1][h], 4), more = _mm256_srai_epi32(parts[2][h], 8);
            sum[h][0] = _mm256_add_epi32(parts[0][h], _mm256_add_epi32(up, more));
        }
    } else if constexpr (C > 0) {
QK_UNROLL(4)
        for (int c = 0; c < C / 32; ++c) add_columns<BITS, KIND, T>(u.codes, C, c, x, sum);
    } else {
QK_UNROLL(1)
        for (int c = 0; c < a.columns / 32; ++c) add_columns<BITS, KIND, T>(u.codes, a.columns, c, x, sum);
    }
QK_UNROLL(2)
    for (int h = 0; h < H; ++h) scale_and_add<T>(u, a, i, row, h, sum[h], acc);
}

struct Avx2 {
    static constexpr bool TILES = false;
    template <int BITS, int KIND, int C>
    static void rows(const Unit &u, const Activations &a, int i, int64_t r0, int64_t r1, float *acc) {
        if constexpr (KIND == A32)
            table_rows<std::conditional_t<BITS == 8, Fp8Eights, Nf4Eights>>(u, a, i, r0, r1, acc);
        else
            rows_in_turn<Avx2, BITS, KIND, C, 4>(u, a, i, r0, r1, acc);
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

void prepare_any(const Weight &w, const void *x, int x_type, int64_t ldx, int64_t m, int compute, void *scratch,
                 int part, int parts) {
    prepare(w, x, x_type, ldx, m, compute, scratch, part, parts, false);
}

}  // namespace

const Path path_avx2 = {prepare_any, run_with<Avx2>};

}  // namespace qk

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
