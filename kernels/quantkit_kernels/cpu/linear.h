// What the linear kernels of every instruction set share: prepared activations, the walk over the units, the
// output. Included by one source per instruction set, so everything here is in an unnamed namespace.
//
// y[t, n] = sum over chunks of s_w s_a (sum of q a - z sum of a), with a the integers that the activations of
// token t and chunk become. The sums are exact in int32 and the few floating-point steps are the same in
// every path (no contraction), so all paths give the same bits.
//
// FP4 is twice its value as an integer, -12 to 12, with no zero point and several groups in a chunk: BITS is E2M1.
//
// Other weights stored by table are y[t, n] = sum over chunks of s_w (sum of table[q] x) in fp32, in any order; BITS
// says which table, 4 NF4 and 8 FP8.
#pragma once

#include <cstdint>
#include <cstring>

#include "activations.h"

namespace qk {

struct Tuning {
    int streams;   // row blocks read side by side
    int prefetch;  // bytes ahead in each, 0: none
};

struct Path {
    void (*prepare)(const Weight &, const void *x, int x_type, int64_t ldx, int64_t m, int compute, void *scratch,
                    int part, int parts);
    // row blocks [b0, b1) of the output
    void (*run)(const Weight &, const void *scratch, int64_t m, void *y, int y_type, int64_t ldy, int b0, int b1,
                Tuning);
};

extern const Path path_portable, path_avx2, path_avx512, path_amx;
bool agrees_with_portable(const Path &);  // on small weights of every width and table

// Loops over registers are unrolled and inlined, but where the intrinsics are emulated: nothing to gain there, and
// minutes of compiling to lose.
#ifdef QK_EMULATE
#define QK_UNROLL(n)
#define QK_INLINE inline
#define QK_APART
#else
#define QK_PRAGMA(text) _Pragma(#text)
#define QK_UNROLL(n) QK_PRAGMA(GCC unroll n)
#define QK_INLINE inline __attribute__((always_inline))
#define QK_APART __attribute__((noinline))
#endif

namespace {

constexpr int MAX_STREAMS = 8, STREAMED_ROWS = 8, TOKEN_BLOCK = 128;
constexpr int E2M1 = 104;  // in place of BITS: the 4-bit codes of FP4

alignas(16) constexpr int8_t FP4_TWICE[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// FP4_TWICE makes sums twice too large; FP8 scales are read as fp16 times 2^-8.
inline float output_factor(const Weight &w) {
    if (w.table != FP4) return w.scale_factor;
    return w.scale_factor * (w.scale_type == SCALES_F8 ? 128.f : 0.5f);
}

// Sixteen outputs of every token, accumulators [rows][16], to y.
inline void write_rows(const Weight &w, const float *acc, int planes, int64_t t0, int64_t t1, int block, void *y,
                       int y_type, int64_t ldy) {
    const int n0 = block * ROWS, count = w.n - n0 < ROWS ? w.n - n0 : ROWS;
    alignas(64) float out[ROWS], bias[ROWS] = {};
    if (w.bias) std::memcpy(bias, w.bias + n0, sizeof(float) * count);
    const float factor = output_factor(w);
    for (int64_t t = t0; t < t1; ++t, acc += ROWS * planes) {
        for (int r = 0; r < ROWS; ++r)
            out[r] = (planes == 2 ? acc[r] + acc[ROWS + r] : acc[r]) * factor + bias[r];
        if (y_type == F32) {
            std::memcpy(static_cast<float *>(y) + t * ldy + n0, out, sizeof(float) * count);
        } else {
            uint16_t halves[ROWS];
            for (int r = 0; r < ROWS; ++r)
                halves[r] = y_type == BF16 ? float_to_bfloat(out[r]) : float_to_half(out[r]);
            std::memcpy(static_cast<uint16_t *>(y) + t * ldy + n0, halves, 2 * count);
        }
    }
}

// One unit and the scales that go with it: fp16 or, if wide, fp32; of 4 parts, FP8 as it is stored.
struct Unit {
    const uint8_t *codes, *scales;
    bool wide;
    int parts;  // groups of FP4 side by side
};

inline void read_scales(const Unit &u, float *scale, float *zero) {
    uint16_t halves[2 * ROWS];
    std::memcpy(halves + ROWS, u.scales + (u.wide ? 64 : 32), 2 * ROWS);
    if (u.wide) {
        std::memcpy(scale, u.scales, sizeof(float) * ROWS);
    } else {
        std::memcpy(halves, u.scales, 2 * ROWS);
        for (int r = 0; r < ROWS; ++r) scale[r] = half_to_float(halves[r]);
    }
    for (int r = 0; r < ROWS; ++r) zero[r] = half_to_float(halves[ROWS + r]);
}

// Codes of the columns 4q .. 4q+3 of block c of 32 columns, one byte each, in the dword lanes of a vector V.
// lane: byte offset in the line (for vectors shorter than it); columns: of the unit.
template <int BITS, class V>
inline typename V::type quad(const uint8_t *codes, int columns, int c, int q, int lane) {
    if constexpr (BITS == 8) {
        return V::load(codes + c * 512 + q * 64 + lane);
    } else if constexpr (BITS == 4) {
        const auto line = V::load(codes + c * 256 + q / 2 * 64 + lane);
        return V::bits(q % 2 ? V::right(line, 4) : line, 0x0f);
    } else {
        const auto line = V::load(codes + c * 128 + q / 4 * 64 + lane);
        const auto low = V::bits(q % 4 ? V::right(line, q % 4 * 2) : line, 0x03);
        if constexpr (BITS == 2) return low;
        const auto high = V::load(codes + columns * 4 + c * 64 + lane);
        return V::either(low, V::bits(q < 2 ? V::left(high, 2 - q) : q == 2 ? high : V::right(high, q - 2), 0x04));
    }
}

inline void prefetch(const uint8_t *from, size_t bytes) {
#if defined(__GNUC__)
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
#else
    (void)from, (void)bytes;
#endif
}

// Rows [r0, r1) of the activations over one unit: MOST (4 or 8) at a time, then as many as are left. A row that is
// alone gets C, a constant number of columns: all of them unrolled read memory fastest.
template <class K, int BITS, int KIND, int C, int MOST>
QK_INLINE void rows_in_turn(const Unit &u, const Activations &a, int i, int64_t r0, int64_t r1, float *acc) {
    if (r1 - r0 == 1) return K::template one<BITS, KIND, C>(u, a, i, r0, acc);
    int64_t row = r0;
    for (; row + MOST <= r1; row += MOST, acc += MOST * ROWS) K::template some<BITS, KIND, MOST>(u, a, i, row, acc);
    if (MOST > 4 && r1 - row >= 4) {
        K::template some<BITS, KIND, 4>(u, a, i, row, acc);
        row += 4, acc += 4 * ROWS;
    }
    switch (r1 - row) {
        case 3: return K::template some<BITS, KIND, 3>(u, a, i, row, acc);
        case 2: return K::template some<BITS, KIND, 2>(u, a, i, row, acc);
        case 1: return K::template some<BITS, KIND, 1>(u, a, i, row, acc);
        default: return;
    }
}

// The walk: row blocks [b0, b1), tokens in blocks that keep their accumulators in L1, chunks in order.
// K::TILES says whether K runs B16;
// K::rows<BITS, KIND, C>(unit, activations, chunk, r0, r1, acc) adds one unit to accumulators [r1 - r0][16].
template <class K, int BITS, int KIND, int C>
void run_blocks(const Weight &w, const Activations &a, int64_t m, void *y, int y_type, int64_t ldy, int b0, int b1,
                Tuning tuning) {
    alignas(64) float acc[TOKEN_BLOCK * ROWS];
    static_assert(TOKEN_BLOCK >= MAX_STREAMS * STREAMED_ROWS, "several row blocks share the space of one");
    const int64_t rows = m * a.planes;
    const int streams = rows <= STREAMED_ROWS ? tuning.streams : 1;
    const size_t unit = unit_bytes(w), block = block_bytes(w), head = per_channel(w) ? scale_bytes(w) : 0;
    const size_t scales = code_bytes(w);
    const bool wide = w.scale_type == SCALES_F32;
    const int chunks = a.chunks, groups = parts(w);
    for (int64_t r0 = 0; r0 < rows; r0 += TOKEN_BLOCK) {
        const int64_t r1 = rows - r0 < TOKEN_BLOCK ? rows : r0 + TOKEN_BLOCK;
        for (int b = b0; b < b1; b += streams) {
            const int live = b1 - b < streams ? b1 - b : streams;
            const size_t acc_stride = size_t(r1 - r0) * ROWS;
            std::memset(acc, 0, sizeof(float) * acc_stride * live);
            const uint8_t *start = w.units + b * block;
            for (int i = 0; i < chunks; ++i)
                for (int s = 0; s < live; ++s) {
                    const uint8_t *codes = start + s * block + head + i * unit;
                    if (tuning.prefetch) prefetch(codes + tuning.prefetch, unit);
                    const Unit u{codes, head ? start + s * block : codes + scales, wide, groups};
                    K::template rows<BITS, KIND, C>(u, a, i, r0, r1, acc + s * acc_stride);
                }
            for (int s = 0; s < live; ++s)
                write_rows(w, acc + s * acc_stride, a.planes, r0 / a.planes, r1 / a.planes, b + s, y, y_type, ldy);
        }
    }
}

template <class K, int KIND, int C>
void run_bits(const Weight &w, const Activations &a, int64_t m, void *y, int y_type, int64_t ldy, int b0, int b1,
              Tuning tuning) {
    switch (w.bits) {
        case 2: return run_blocks<K, 2, KIND, C>(w, a, m, y, y_type, ldy, b0, b1, tuning);
        case 3: return run_blocks<K, 3, KIND, C>(w, a, m, y, y_type, ldy, b0, b1, tuning);
        case 4: return run_blocks<K, 4, KIND, C>(w, a, m, y, y_type, ldy, b0, b1, tuning);
        default: return run_blocks<K, 8, KIND, C>(w, a, m, y, y_type, ldy, b0, b1, tuning);
    }
}

template <class K, int KIND>
void run_kind(const Weight &w, const Activations &a, int64_t m, void *y, int y_type, int64_t ldy, int b0, int b1,
              Tuning tuning) {
    switch (a.columns) {
        case 32: return run_bits<K, KIND, 32>(w, a, m, y, y_type, ldy, b0, b1, tuning);
        case 64: return run_bits<K, KIND, 64>(w, a, m, y, y_type, ldy, b0, b1, tuning);
        default: return run_bits<K, KIND, 128>(w, a, m, y, y_type, ldy, b0, b1, tuning);
    }
}

// bf16 tiles: only a K that has them is ever given such activations.
template <class K>
void run_tiles(const Weight &w, const Activations &a, int64_t m, void *y, int y_type, int64_t ldy, int b0, int b1,
               Tuning tuning) {
    if constexpr (K::TILES)
        run_kind<K, B16>(w, a, m, y, y_type, ldy, b0, b1, tuning);
    else
        (void)w, (void)a, (void)m, (void)y, (void)y_type, (void)ldy, (void)b0, (void)b1, (void)tuning;
}

template <class K>
void run_with(const Weight &w, const void *scratch, int64_t m, void *y, int y_type, int64_t ldy, int b0, int b1,
              Tuning tuning) {
    const Activations a = open_scratch(scratch);
    if (w.table == FP4)
        run_blocks<K, E2M1, A16, 0>(w, a, m, y, y_type, ldy, b0, b1, tuning);
    else if (a.kind == A8)
        run_kind<K, A8>(w, a, m, y, y_type, ldy, b0, b1, tuning);
    else if (a.kind == A16)
        run_kind<K, A16>(w, a, m, y, y_type, ldy, b0, b1, tuning);
    else if (a.kind == B16)
        run_tiles<K>(w, a, m, y, y_type, ldy, b0, b1, tuning);
    else if (w.table == NF4)
        run_blocks<K, 4, A32, 0>(w, a, m, y, y_type, ldy, b0, b1, tuning);
    else
        run_blocks<K, 8, A32, 0>(w, a, m, y, y_type, ldy, b0, b1, tuning);
}

}  // namespace
}  // namespace qk
