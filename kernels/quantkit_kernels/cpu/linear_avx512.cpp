// AVX-512 with VNNI: int8 activations through dpbusd, int16 ones through dpwssd, in the packed layout's own order.
// dpwssd does as many products per instruction as a bf16 dot and takes fp16 and fp32 activations too, exactly.
#include "common.h"

#if defined(__x86_64__)
#ifdef QK_EMULATE
#include "emulate.h"
#else
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#endif
#endif
#include "linear_avx512.h"

namespace qk {
namespace {

void prepare_any(const Weight &w, const void *x, int x_type, int64_t ldx, int64_t m, int compute, void *scratch,
                 int part, int parts) {
    prepare(w, x, x_type, ldx, m, compute, scratch, part, parts, false);
}

}  // namespace

const Path path_avx512 = {prepare_any, run_with<Vnni>};

}  // namespace qk

#if defined(__clang__) && !defined(QK_EMULATE)
#pragma clang attribute pop
#endif
#endif
