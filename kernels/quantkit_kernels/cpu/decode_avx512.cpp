// x86 with AVX-512.
#include "common.h"
#include "decode_math.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif
#define LANES 16
#define QK_PATH math_avx512
#include "decode_path.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
