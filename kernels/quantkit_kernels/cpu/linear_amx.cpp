// AMX: tiles from 9 tokens on, the avx512 path below. The packed layout is the order that tiles want: a quad of
// columns of all 16 rows is one row of the weights' tile.
//
// int8: 16 tokens x 64 columns times 64 columns x 16 rows, unsigned codes unpacked to a panel of one unit (2 KB).
// bf16: the same in steps of 32 columns on q as bf16 (exact), the zero point taken off with the chunk's sum of x.
// Configured at every entry and put back at exit: oneDNN configures the same registers on the same threads.
#include "common.h"

#if defined(__x86_64__)
#ifdef QK_EMULATE
#include "emulate.h"
#else
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c,amx-tile,amx-int8,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c,amx-tile,amx-int8,amx-bf16")
#endif
#endif
#include "linear_avx512.h"

namespace qk {
namespace {

constexpr int TILE = 16, FEW = 8;

struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "as the hardware reads it");

// gcc 12 declares only 8 bytes of the configuration as read and drops the stores of the rest.
inline void load_config(const Config &config) {
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
}

// Tiles 0-3 results [16 tokens][16 rows], 4 and 5 activations, 6 and 7 weights of `bytes` bytes per token.
class Tiles {
  public:
    explicit Tiles(int bytes) {
        _tile_storeconfig(&before_);
        __asm__ volatile("" ::"r"(&before_) : "memory");
        Config config{};
        config.palette = 1;
        for (int i = 0; i < 8; ++i) {
            const int depth = bytes < 64 ? bytes : 64;
            config.rows[i] = uint8_t(i < 6 ? TILE : depth / 4);
            config.bytes_per_row[i] = uint16_t(i == 4 || i == 5 ? depth : 64);
        }
        load_config(config);
    }
    Tiles(const Tiles &) = delete;
    Tiles &operator=(const Tiles &) = delete;
    ~Tiles() {
        if (before_.palette)
            load_config(before_);
        else
            _tile_release();
    }

  private:
    Config before_{};
};

// A unit as rows of the weights' tiles: bytes [columns / 4][64].
template <int BITS>
inline void unpack_bytes(const Unit &u, int columns, uint8_t *panel) {
    for (int c = 0; c < columns / 32; ++c)
QK_UNROLL(8)
        for (int q = 0; q < 8; ++q)
            _mm512_storeu_si512(panel + (c * 8 + q) * 64, quad<BITS, Whole>(u.codes, columns, c, q, 0));
}

// bf16 [columns / 2][32], the columns of each four in the order 0, 2, 1, 3.
template <int BITS>
inline void unpack_bfloats(const Unit &u, int columns, uint8_t *panel) {
    alignas(64) uint16_t small[32];
    for (int i = 0; i < 32; ++i) small[i] = float_to_bfloat(float(i));
    const __m512i table = _mm512_loadu_si512(small), byte = _mm512_set1_epi32(255);
    const __m512i pair = _mm512_set1_epi32(0x00ff00ff);
    const auto wide = [&](__m512i low, __m512i high) {  // integers below 256 are exact in bf16
        const __m512i a = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_and_si512(low, byte)));
        const __m512i b = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_and_si512(high, byte)));
        return _mm512_or_si512(_mm512_srli_epi32(a, 16), b);
    };
    for (int c = 0; c < columns / 32; ++c)
QK_UNROLL(8)
        for (int q = 0; q < 8; ++q) {
            const __m512i code = quad<BITS, Whole>(u.codes, columns, c, q, 0), odd = _mm512_srli_epi32(code, 8);
            uint8_t *to = panel + (c * 8 + q) * 128;
            if constexpr (BITS == 8) {
                _mm512_storeu_si512(to, wide(code, _mm512_srli_epi32(code, 16)));
                _mm512_storeu_si512(to + 64, wide(odd, _mm512_srli_epi32(code, 24)));
            } else {
                _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_and_si512(code, pair), table));
                _mm512_storeu_si512(to + 64, _mm512_permutexvar_epi16(_mm512_and_si512(odd, pair), table));
            }
        }
}

// One step of `bytes` per token: two tiles deep at most per call, 16 tokens into result tile R.
#define QK_STEP(R, MULTIPLY)                                                   \
    do {                                                                       \
        _tile_loadd(4, x + (R) * TILE * stride, stride);                       \
        MULTIPLY(R, 4, 6);                                                     \
        if (deep) {                                                            \
            _tile_loadd(5, x + (R) * TILE * stride + 64, stride);              \
            MULTIPLY(R, 5, 7);                                                 \
        }                                                                      \
    } while (0)

// `count` tiles of 16 tokens (at most 4) times a panel, into results [count * 16][16] of 4 bytes.
template <bool FLOATS>
inline void multiply(const char *x, int64_t stride, const uint8_t *panel, int bytes, int count, void *results) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int at = 0; at < bytes; at += 128, x += 128, panel += 128 * TILE) {
        const bool deep = bytes - at > 64;
        _tile_loadd(6, panel, 64);
        if (deep) _tile_loadd(7, panel + 64 * TILE, 64);
        if constexpr (FLOATS) {
            QK_STEP(0, _tile_dpbf16ps);
            if (count > 1) QK_STEP(1, _tile_dpbf16ps);
            if (count > 2) QK_STEP(2, _tile_dpbf16ps);
            if (count > 3) QK_STEP(3, _tile_dpbf16ps);
        } else {
            QK_STEP(0, _tile_dpbsud);
            if (count > 1) QK_STEP(1, _tile_dpbsud);
            if (count > 2) QK_STEP(2, _tile_dpbsud);
            if (count > 3) QK_STEP(3, _tile_dpbsud);
        }
    }
    char *to = static_cast<char *>(results);
    _tile_stored(0, to, 64);
    if (count > 1) _tile_stored(1, to + 1024, 64);
    if (count > 2) _tile_stored(2, to + 2048, 64);
    if (count > 3) _tile_stored(3, to + 3072, 64);
}

struct Amx {
    static constexpr bool TILES = true;

    template <int BITS, int KIND, int C>
    static void rows(const Unit &u, const Activations &a, int i, int64_t r0, int64_t r1, float *acc) {
        if constexpr (KIND == A16 || KIND == A32)
            Vnni::rows<BITS, KIND, C>(u, a, i, r0, r1, acc);
        else if (KIND == A8 && r1 - r0 <= FEW)
            Vnni::rows<BITS, A8, C>(u, a, i, r0, r1, acc);
        else
            with_tiles<BITS, KIND>(u, a, i, r0, r1, acc);
    }

    template <int BITS, int KIND>
    QK_APART static void with_tiles(const Unit &u, const Activations &a, int i, int64_t r0,
                                                     int64_t r1, float *acc) {
        constexpr bool FLOATS = KIND == B16;
        alignas(64) uint8_t panel[128 * TILE * (FLOATS ? 2 : 1)];
        alignas(64) int32_t results[4 * TILE * ROWS];
        if constexpr (FLOATS)
            unpack_bfloats<BITS>(u, a.columns, panel);
        else
            unpack_bytes<BITS>(u, a.columns, panel);
        const __m512 scale = unit_scales(u), zero = _mm512_cvtepi32_ps(unit_zeros(u));
        const float *token_scale = a.scale + i * a.rows;
        const int32_t *token_sum = a.sum + i * a.rows;
        for (int64_t row = r0; row < r1; row += 4 * TILE) {
            const int live = int(r1 - row < 4 * TILE ? r1 - row : 4 * TILE);
            multiply<FLOATS>(a.at<KIND>(row, i), a.stride, panel, a.columns * (FLOATS ? 2 : 1), (live + TILE - 1) / TILE,
                             results);
            for (int t = 0; t < live; ++t, acc += ROWS) {
                const __m512i raw = _mm512_loadu_si512(results + t * ROWS);
                __m512 value, both = scale;
                if constexpr (FLOATS) {
                    const __m512 offset = _mm512_mul_ps(zero, _mm512_set1_ps(token_scale[row + t]));
                    value = _mm512_sub_ps(_mm512_castsi512_ps(raw), offset);
                } else {  // below 2^24: exact in fp32
                    const __m512 offset = _mm512_mul_ps(zero, _mm512_set1_ps(float(token_sum[row + t])));
                    value = _mm512_sub_ps(_mm512_cvtepi32_ps(raw), offset);
                    both = _mm512_mul_ps(scale, _mm512_set1_ps(token_scale[row + t]));
                }
                _mm512_storeu_ps(acc, _mm512_add_ps(_mm512_loadu_ps(acc), _mm512_mul_ps(value, both)));
            }
        }
    }
};

void prepare_tiles(const Weight &w, const void *x, int x_type, int64_t ldx, int64_t m, int compute, void *scratch,
                   int part, int parts) {
    prepare(w, x, x_type, ldx, m, compute, scratch, part, parts, true);
}

void run_amx(const Weight &w, const void *scratch, int64_t m, void *y, int y_type, int64_t ldy, int b0, int b1,
             Tuning tuning) {
    const Activations a = open_scratch(scratch);
    if (m > FEW && (a.kind == A8 || a.kind == B16)) {
        const Tiles tiles(a.columns * (a.kind == B16 ? 2 : 1));
        run_with<Amx>(w, scratch, m, y, y_type, ldy, b0, b1, tuning);
    } else {
        run_with<Vnni>(w, scratch, m, y, y_type, ldy, b0, b1, tuning);
    }
}

}  // namespace

const Path path_amx = {prepare_tiles, run_amx};

}  // namespace qk

#if defined(__clang__) && !defined(QK_EMULATE)
#pragma clang attribute pop
#endif
#endif
