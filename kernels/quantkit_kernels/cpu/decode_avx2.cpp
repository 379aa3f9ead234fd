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
#define QK_PATH math_avx2
#include "decode_path.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
