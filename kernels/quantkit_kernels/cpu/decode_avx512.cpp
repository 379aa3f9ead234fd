// x86 with AVX-512. With QK_EMULATE the same vectors without its instructions, for tests elsewhere.
#include "common.h"
#include "decode_math.h"
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(QK_EMULATE)
#pragma GCC diagnostic ignored "-Wpsabi"
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif
#define LANES 16
#if !defined(QK_EMULATE)
#define FUSED _mm512_fmadd_ps
#endif
#define QK_PATH math_avx512
#include "decode_path.h"
#if defined(__clang__) && !defined(QK_EMULATE)
#pragma clang attribute pop
#endif
#endif
