// x86 with AVX2 and FMA.
#include "common.h"
#include "decode_math.h"
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LANES 8
#define FUSED _mm256_fmadd_ps
#define WIDEN16(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define WIDEN_F16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define WIDEN8(p) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
inline __m256 qk_widen_fp8_avx2(const void *p) {
    const __m128i w = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)p));
    const __m128i magnitude = _mm_slli_epi16(_mm_and_si128(w, _mm_set1_epi16(0x7f)), 7);
    return _mm256_cvtph_ps(_mm_or_si128(magnitude, _mm_slli_epi16(_mm_and_si128(w, _mm_set1_epi16(0x80)), 8)));
}
#define WIDEN_FP8(p) qk_widen_fp8_avx2(p)
#define QK_PATH math_avx2
#include "decode_path.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
