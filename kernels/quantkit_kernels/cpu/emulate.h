// Scalar twins of exactly the AVX-512 and AMX intrinsics that the linear kernels use, by Intel's pseudocode, so that
// those sources are tested on machines without them (-DQK_EMULATE). Never part of the library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "half.h"

struct alignas(16) __m128i {
    uint8_t b[16];
};
struct alignas(32) __m256i {
    uint16_t w[16];
};
struct alignas(64) __m512i {
    uint32_t d[16];
};
struct alignas(64) __m512 {
    float f[16];
};

namespace {

template <class F>
inline __m512i emulate_map(F f) {
    __m512i r;
    for (int i = 0; i < 16; ++i) r.d[i] = uint32_t(f(i));
    return r;
}

template <class F>
inline __m512 emulate_floats(F f) {
    __m512 r;
    for (int i = 0; i < 16; ++i) r.f[i] = f(i);
    return r;
}

inline __m512i _mm512_loadu_si512(const void *from) {
    __m512i r;
    std::memcpy(&r, from, 64);
    return r;
}
inline void _mm512_storeu_si512(void *to, __m512i v) { std::memcpy(to, &v, 64); }
inline __m256i _mm256_loadu_si256(const __m256i *from) {
    __m256i r;
    std::memcpy(&r, static_cast<const void *>(from), 32);
    return r;
}
inline __m128i _mm_loadu_si128(const __m128i *from) {
    __m128i r;
    std::memcpy(&r, static_cast<const void *>(from), 16);
    return r;
}
inline __m256i _mm256_cvtepu8_epi16(__m128i v) {
    __m256i r;
    for (int i = 0; i < 16; ++i) r.w[i] = v.b[i];
    return r;
}
inline __m256i _mm256_slli_epi16(__m256i v, int n) {
    for (uint16_t &word : v.w) word = uint16_t(word << n);
    return v;
}
inline __m512 _mm512_loadu_ps(const void *from) {
    __m512 r;
    std::memcpy(&r, from, 64);
    return r;
}
inline void _mm512_storeu_ps(void *to, __m512 v) { std::memcpy(to, &v, 64); }

inline __m512i _mm512_setzero_si512() { return {}; }
inline __m512i _mm512_set1_epi32(int x) {
    return emulate_map([&](int) { return x; });
}
inline __m512i _mm512_set1_epi64(long long x) {
    return emulate_map([&](int i) { return uint32_t(uint64_t(x) >> (i % 2 * 32)); });
}
inline __m512i _mm512_set1_epi8(char x) { return _mm512_set1_epi32(int(uint8_t(x) * 0x01010101u)); }
inline __m512 _mm512_setzero_ps() { return {}; }
inline __m512 _mm512_set1_ps(float x) {
    return emulate_floats([&](int) { return x; });
}
inline __m512i _mm512_srli_epi32(__m512i v, unsigned n) {
    return emulate_map([&](int i) { return v.d[i] >> n; });
}
inline __m512i _mm512_slli_epi32(__m512i v, unsigned n) {
    return emulate_map([&](int i) { return v.d[i] << n; });
}
inline __m512i _mm512_slli_epi16(__m512i v, unsigned n) {
    return emulate_map([&](int i) { return (v.d[i] >> 16 << n) << 16 | uint16_t(v.d[i] << n); });
}
inline __m512i _mm512_srai_epi16(__m512i v, unsigned n) {
    return emulate_map([&](int i) {
        return uint32_t(int16_t(v.d[i] >> 16) >> n) << 16 | uint16_t(int16_t(v.d[i]) >> n);
    });
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
    return emulate_map([&](int i) { return a.d[i] & b.d[i]; });
}
inline __m512i _mm512_or_si512(__m512i a, __m512i b) {
    return emulate_map([&](int i) { return a.d[i] | b.d[i]; });
}
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
    return emulate_map([&](int i) { return a.d[i] - b.d[i]; });
}
inline __m512i _mm512_mullo_epi32(__m512i a, __m512i b) {
    return emulate_map([&](int i) { return a.d[i] * b.d[i]; });
}
inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
    return emulate_floats([&](int i) { return a.f[i] + b.f[i]; });
}
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) {
    return emulate_floats([&](int i) { return a.f[i] - b.f[i]; });
}
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
    return emulate_floats([&](int i) { return a.f[i] * b.f[i]; });
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return emulate_floats([&](int i) { return std::fma(a.f[i], b.f[i], c.f[i]); });
}
inline __m512 _mm512_cvtepi32_ps(__m512i v) {
    return emulate_floats([&](int i) { return float(int32_t(v.d[i])); });
}
inline __m512i _mm512_cvtps_epi32(__m512 v) {  // of whole numbers here
    return emulate_map([&](int i) { return int32_t(v.f[i]); });
}
inline __m512 _mm512_cvtph_ps(__m256i v) {
    return emulate_floats([&](int i) { return qk::half_to_float(v.w[i]); });
}
inline __m512i _mm512_castps_si512(__m512 v) {
    __m512i r;
    std::memcpy(&r, &v, 64);
    return r;
}
inline __m512 _mm512_castsi512_ps(__m512i v) {
    __m512 r;
    std::memcpy(&r, &v, 64);
    return r;
}
inline __m256i _mm512_castsi512_si256(__m512i v) {
    __m256i r;
    std::memcpy(&r, &v, 32);
    return r;
}
inline __m256i _mm512_extracti64x4_epi64(__m512i v, int half) {
    __m256i r;
    std::memcpy(&r, v.d + 8 * (half & 1), 32);
    return r;
}
inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 table) {
    return emulate_floats([&](int i) { return table.f[index.d[i] & 15]; });
}
inline __m512 _mm512_permutex2var_ps(__m512 low, __m512i index, __m512 high) {
    return emulate_floats([&](int i) { return (index.d[i] & 16 ? high : low).f[index.d[i] & 15]; });
}
// Each lane of 16 bytes looks up its own 16 bytes of the table; an index above 127 gives 0.
inline __m512i _mm512_shuffle_epi8(__m512i table, __m512i index) {
    uint8_t at[64], from[64], to[64];
    std::memcpy(at, &index, 64);
    std::memcpy(from, &table, 64);
    for (int i = 0; i < 64; ++i) to[i] = at[i] & 128 ? 0 : from[(i & ~15) | (at[i] & 15)];
    return _mm512_loadu_si512(to);
}
inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i table) {
    uint16_t at[32], from[32], to[32];
    std::memcpy(at, &index, 64);
    std::memcpy(from, &table, 64);
    for (int i = 0; i < 32; ++i) to[i] = from[at[i] & 31];
    return _mm512_loadu_si512(to);
}

// Unsigned bytes of a times signed bytes of b, four to a lane.
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
    return emulate_map([&](int i) {
        uint32_t r = sum.d[i];
        for (int j = 0; j < 32; j += 8) r += uint32_t(int(a.d[i] >> j & 255) * int8_t(b.d[i] >> j & 255));
        return r;
    });
}
// Signed 16 bits times signed 16 bits, two to a lane.
inline __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
    return emulate_map([&](int i) {
        uint32_t r = sum.d[i];
        for (int j = 0; j < 32; j += 16) r += uint32_t(int16_t(a.d[i] >> j & 65535) * int16_t(b.d[i] >> j & 65535));
        return r;
    });
}

// Tiles fault as the hardware does when nothing is configured or the shapes do not fit.
struct EmulatedTiles {
    uint8_t palette = 0;
    uint16_t bytes[8] = {};
    uint8_t rows[8] = {};
    uint32_t data[8][16][16] = {};
};
inline thread_local EmulatedTiles emulated_tiles;

inline void emulate_require(bool fine, const char *what) {
    if (fine) return;
    std::fprintf(stderr, "emulated tiles: %s\n", what);
    std::abort();
}
inline void _tile_loadconfig(const void *config) {
    const auto *bytes = static_cast<const uint8_t *>(config);
    EmulatedTiles &t = emulated_tiles = EmulatedTiles();
    t.palette = bytes[0];
    for (int i = 0; i < 8; ++i) {
        std::memcpy(&t.bytes[i], bytes + 16 + 2 * i, 2);
        t.rows[i] = bytes[48 + i];
        emulate_require(t.bytes[i] <= 64 && t.rows[i] <= 16, "a tile has at most 16 rows of 64 bytes");
    }
}
inline void _tile_storeconfig(void *config) {
    auto *bytes = static_cast<uint8_t *>(config);
    std::memset(bytes, 0, 64);
    bytes[0] = emulated_tiles.palette;
    for (int i = 0; i < 8; ++i) {
        std::memcpy(bytes + 16 + 2 * i, &emulated_tiles.bytes[i], 2);
        bytes[48 + i] = emulated_tiles.rows[i];
    }
}
inline void _tile_release() { emulated_tiles = EmulatedTiles(); }
inline void _tile_zero(int tile) {
    emulate_require(emulated_tiles.palette == 1, "not configured");
    std::memset(emulated_tiles.data[tile], 0, sizeof emulated_tiles.data[tile]);
}
inline void _tile_loadd(int tile, const void *from, int64_t stride) {
    EmulatedTiles &t = emulated_tiles;
    emulate_require(t.palette == 1, "not configured");
    std::memset(t.data[tile], 0, sizeof t.data[tile]);
    for (int r = 0; r < t.rows[tile]; ++r)
        std::memcpy(t.data[tile][r], static_cast<const char *>(from) + r * stride, t.bytes[tile]);
}
inline void _tile_stored(int tile, void *to, int64_t stride) {
    EmulatedTiles &t = emulated_tiles;
    emulate_require(t.palette == 1, "not configured");
    for (int r = 0; r < t.rows[tile]; ++r)
        std::memcpy(static_cast<char *>(to) + r * stride, t.data[tile][r], t.bytes[tile]);
}
template <class F>
inline void emulate_product(int c, int a, int b, F dot) {
    EmulatedTiles &t = emulated_tiles;
    emulate_require(t.palette == 1, "not configured");
    emulate_require(t.rows[c] == t.rows[a] && t.bytes[a] / 4 == t.rows[b] && t.bytes[c] == t.bytes[b], "shapes");
    for (int m = 0; m < t.rows[c]; ++m)
        for (int k = 0; k < t.rows[b]; ++k)
            for (int n = 0; n < t.bytes[c] / 4; ++n) t.data[c][m][n] = dot(t.data[c][m][n], t.data[a][m][k], t.data[b][k][n]);
}
inline void _tile_dpbsud(int c, int a, int b) {  // signed times unsigned
    emulate_product(c, a, b, [](uint32_t sum, uint32_t x, uint32_t y) {
        for (int j = 0; j < 32; j += 8) sum += uint32_t(int8_t(x >> j & 255) * int(y >> j & 255));
        return sum;
    });
}
inline void _tile_dpbf16ps(int c, int a, int b) {
    emulate_product(c, a, b, [](uint32_t sum, uint32_t x, uint32_t y) {
        float r = qk::bits_to_float(sum);
        r += qk::bfloat_to_float(uint16_t(x)) * qk::bfloat_to_float(uint16_t(y));
        r += qk::bfloat_to_float(uint16_t(x >> 16)) * qk::bfloat_to_float(uint16_t(y >> 16));
        return qk::float_to_bits(r);
    });
}

}  // namespace
