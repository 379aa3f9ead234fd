// Attention over pages of a quantized KV cache: the C entry, and whether a path computes it as the portable one does.
#include "kv_pages.h"

#include <cmath>
#include <cstdlib>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "common.h"
#include "decode_math.h"

namespace qk {
namespace {

bool known(const qk_kv_side &side) {
    return side.type == QK_KV_INT8 || side.type == QK_KV_FP8 || (side.type == QK_KV_INT4 && side.dim % 2 == 0);
}

constexpr int HEADS = 2, ROWS_EACH = 23, PLACES = 100, SIZE = 37 * 2;  // ragged everywhere

// Largest scores, masses and outputs of a small random cache.
std::vector<float> sample(const Math &math, int type, bool stored) {
    uint32_t state = uint32_t(type) + 1;
    const auto next = [&state] { return (state = state * 1664525u + 1013904223u) >> 24; };
    std::vector<uint8_t> keys(HEADS * PLACES * SIZE), values(keys.size());
    for (auto *codes : {&keys, &values})
        for (uint8_t &code : *codes) {
            code = uint8_t(next());
            if (type == QK_KV_FP8 && (code & 127) == 127) code ^= 1;
        }
    std::vector<float> q(HEADS * ROWS_EACH * SIZE), scales(HEADS * PLACES), sums(HEADS * ROWS_EACH * (2 + SIZE));
    const float unit = type == QK_KV_INT8 ? 0x1p-6f : type == QK_KV_FP8 ? 0x1p-7f : 0x1p-2f;
    for (float &x : q) x = (float(next()) - 127.5f) * 0x1p-9f;
    for (float &x : scales) x = float(next() + 1) * 0x1p-8f * unit;
    float *top = sums.data(), *mass = top + HEADS * ROWS_EACH, *out = mass + HEADS * ROWS_EACH;
    for (int i = 0; i < HEADS * ROWS_EACH; ++i) top[i] = -INFINITY;
    const void *k = keys.data(), *v = values.data();
    const float *of = scales.data();
    qk_kv_pages a{};
    a.q = q.data();
    a.k = {&k, stored ? nullptr : &of, stored ? of : nullptr, type, SIZE};
    a.v = a.k, a.v.codes = &v;
    a.top = top, a.mass = mass, a.out = out;
    a.batch = 1, a.kv_heads = HEADS, a.rows = ROWS_EACH, a.tokens = ROWS_EACH;
    a.page = a.places = PLACES, a.position = PLACES - ROWS_EACH, a.softcap = stored ? 20.0f : 0.0f;
    std::vector<float> scratch(kv_pages_floats(a));
    math.kv_pages(a, scratch.data(), 0, stored ? 8 : 1);  // some or all rows, few or many to a tile
    return sums;
}

}  // namespace

bool kv_pages_agree(int isa) {
    const Math &math = math_of(isa);
    for (int type : {QK_KV_INT8, QK_KV_FP8, QK_KV_INT4})
        for (bool stored : {false, true}) {
            const std::vector<float> wanted = sample(math_portable, type, stored), got = sample(math, type, stored);
            double error = 0, whole = 0;
            for (size_t i = 0; i < wanted.size(); ++i) {
                if (std::isinf(wanted[i]) && got[i] == wanted[i]) continue;
                error += (double(got[i]) - wanted[i]) * (double(got[i]) - wanted[i]);
                whole += double(wanted[i]) * wanted[i];
            }
            if (!(error <= 1e-10 * whole)) return false;
        }
    return true;
}

}  // namespace qk

using namespace qk;

extern "C" int qk_kv_attend(const qk_kv_pages *pages, int threads) {
    const qk_kv_pages &a = *pages;
    if (qk_isa() < 0 || !known(a.k) || !known(a.v)) return 1;
    const int64_t rows = a.batch * a.kv_heads * a.rows;
    if (rows == 0 || a.places == 0) return 0;
    const Math &path = math_of(qk_isa());
    // Below some ten microseconds of work waking a second thread costs more than it gives.
    int most = rows * a.places * (a.k.dim + a.v.dim) < (1 << 18) ? 1 : threads;
    if (most > rows) most = int(rows);
    const size_t floats = (kv_pages_floats(a) + 15) / 16 * 16;
    void *scratch = nullptr;
    if (posix_memalign(&scratch, 64, floats * sizeof(float) * most)) return 2;
#ifdef _OPENMP
    if (most > 1) {
#pragma omp parallel num_threads(most)
        path.kv_pages(a, static_cast<float *>(scratch) + floats * omp_get_thread_num(), omp_get_thread_num(),
                      omp_get_num_threads());
    } else
#endif
        path.kv_pages(a, static_cast<float *>(scratch), 0, 1);
    free(scratch);
    return 0;
}
