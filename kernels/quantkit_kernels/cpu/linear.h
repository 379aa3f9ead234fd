// What the linear kernels of every instruction set share: prepared activations, the walk over the units, the
// output. Included by one source per instruction set, so everything here is in an unnamed namespace.
//
// y[t, n] = sum over chunks of s_w s_a (sum of q a - z sum of a), with a the integers that the activations of
// token t and chunk become. The sums are exact in int32 and the few floating-point steps are the same in
// every path (no contraction), so all paths give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"
#include "half.h"

namespace qk {

struct Tuning {
    int streams;   // row blocks read side by side
    int prefetch;  // bytes ahead in each, 0: none
};

struct Path {
    void (*prepare)(const Weight &, const void *x, int x_type, int64_t ldx, int64_t m, int compute, void *scratch,
                    int part, int parts);
    void (*run)(const Weight &, const void *scratch, int64_t m, void *y, int y_type, int64_t ldy, int part, int parts,
                Tuning);
};

extern const Path path_portable, path_avx2, path_avx512, path_amx;
bool agrees_with_portable(const Path &);  // on small weights of every width
const float *table_values(int table);  // fp32 value of every code of a table

namespace {

enum Kind : int32_t {
    A8,   // int8
    A16,  // int16, scaled by powers of two; fp32 inputs become two rows, the second what the first left over
    A32,  // fp32, for tables
    B16,  // bf16 as it came, for bf16 tiles, in the order of int16; `scale` holds the chunk's sum
};

constexpr int MAX_STREAMS = 8, STREAMED_ROWS = 8, TOKEN_BLOCK = 128;

// The scratch: this header (64 bytes), values [rows][stride], scale [chunks][rows], sum [chunks][rows].
struct Header {
    int32_t kind, planes, chunks, columns;  // columns of a chunk
    int64_t rows, stride;                   // rows = m * planes, from 9 on whole tiles of 16; stride in bytes
};

struct Activations : Header {
    const char *values;
    const float *scale;
    const int32_t *sum;
    const char *at(int64_t row, int i) const {
        return values + row * stride + int64_t(i) * columns * (kind == A8 ? 1 : kind == A32 ? 4 : 2);
    }
};

inline size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

inline int64_t padded_rows(int64_t rows) { return rows <= 8 ? rows : (rows + 15) / 16 * 16; }

inline Header describe(const Weight &w, int x_type, int64_t m, int compute, bool tiles) {
    Header h;
    const bool bfloats = x_type == BF16 || (x_type == F32 && compute == HALVES);
    h.kind = w.table ? A32 : is_int8(compute) ? A8 : tiles && bfloats && m >= 16 ? B16 : A16;
    h.planes = h.kind == A16 && x_type == F32 && compute != HALVES ? 2 : 1;
    h.columns = chunk(w);
    h.chunks = chunks(w);
    h.rows = padded_rows(m * h.planes);
    // One line more than the values take: power-of-two strides would put all rows in the same cache sets.
    h.stride = int64_t(round_up(size_t(h.chunks) * h.columns * (h.kind == A8 ? 1 : h.kind == A32 ? 4 : 2), 64)) + 64;
    return h;
}

inline size_t bytes_of(const Header &h) {
    return 64 + size_t(h.rows) * size_t(h.stride) + 2 * round_up(sizeof(float) * size_t(h.rows) * h.chunks, 64);
}

inline Activations open_scratch(const void *scratch) {
    Activations a;
    std::memcpy(static_cast<Header *>(&a), scratch, sizeof(Header));
    a.values = static_cast<const char *>(scratch) + 64;
    const char *scale = a.values + a.rows * a.stride;
    a.scale = reinterpret_cast<const float *>(scale);
    a.sum = reinterpret_cast<const int32_t *>(scale + round_up(sizeof(float) * size_t(a.rows) * a.chunks, 64));
    return a;
}

// count values of row `x` from `start` as fp32, zeros from `valid` on.
inline void load_floats(const void *x, int x_type, int64_t start, int count, int valid, float *out) {
    if (valid < count) std::memset(out + valid, 0, sizeof(float) * (count - valid));
    if (x_type == F32) {
        std::memcpy(out, static_cast<const float *>(x) + start, sizeof(float) * valid);
        return;
    }
    const uint16_t *from = static_cast<const uint16_t *>(x) + start;
    if (x_type == BF16)
        for (int i = 0; i < valid; ++i) out[i] = bfloat_to_float(from[i]);
    else
        for (int i = 0; i < valid; ++i) out[i] = half_to_float(from[i]);
}

// Largest |x|; a NaN counts as larger than infinity, so that it reaches the scale and the output.
inline float largest(const float *x, int count) {
    uint32_t most = 0;
    for (int i = 0; i < count; ++i) {
        const uint32_t bits = float_to_bits(x[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return bits_to_float(most);
}

// Round to the nearest integer, |x| < 2^22: adding 1.5 * 2^23 leaves it in the low bits.
constexpr float MAGIC = 12582912.f;
inline int32_t round_to_int(float x) { return int32_t(float_to_bits(x + MAGIC) - 0x4b400000u); }

inline int32_t to_int8(const float *x, int count, float inverse, int8_t *out) {
    int32_t sum = 0;
    for (int i = 0; i < count; ++i) {
        const int8_t q = int8_t(round_to_int(x[i] * inverse));
        out[i] = q;
        sum += q;
    }
    return sum;
}

// int16 with the columns of each four in the order 0, 2, 1, 3: a dword pairs with the even or the odd bytes of
// four codes. `rest` gets what is left, times 2^15.
inline int32_t to_int16(const float *x, int count, float inverse, int16_t *out, float *rest) {
    int32_t sum = 0;
    int16_t plain[128];
    for (int i = 0; i < count; ++i) {
        const float scaled = x[i] * inverse;
        int32_t q = round_to_int(scaled);
        q = q > 32767 ? 32767 : q < -32767 ? -32767 : q;
        rest[i] = (scaled - float(q)) * 32768.f;
        plain[i] = int16_t(q);
        sum += int16_t(q);
    }
    for (int i = 0; i < count; i += 4) {
        out[i] = plain[i];
        out[i + 1] = plain[i + 2];
        out[i + 2] = plain[i + 1];
        out[i + 3] = plain[i + 3];
    }
    return sum;
}

inline void prepare(const Weight &w, const void *x, int x_type, int64_t ldx, int64_t m, int compute, void *scratch,
                    int part, int parts, bool tiles) {
    const Header h = describe(w, x_type, m, compute, tiles);
    if (part == 0) std::memcpy(scratch, &h, sizeof h);
    char *values = static_cast<char *>(scratch) + 64;
    char *after = values + h.rows * h.stride;
    auto *scales = reinterpret_cast<float *>(after);
    auto *sums = reinterpret_cast<int32_t *>(after + round_up(sizeof(float) * size_t(h.rows) * h.chunks, 64));
    alignas(64) float buffer[128], rest[128];
    const int64_t size = x_type == F32 ? 4 : 2;
    int64_t token = -1;
    float token_largest = 0;
    for (int64_t item = m * h.chunks * part / parts; item < m * h.chunks * (part + 1) / parts; ++item) {
        const int64_t t = item / h.chunks;
        const int i = int(item % h.chunks), start = i * h.columns;
        const int valid = w.k - start < h.columns ? w.k - start : h.columns;
        const char *row = static_cast<const char *>(x) + t * ldx * size;
        if (compute == INT8_TOKEN && h.kind == A8 && token != t) {
            token = t;
            token_largest = 0;
            for (int k = 0; k < w.k; k += 128) {
                const int count = w.k - k < 128 ? w.k - k : 128;
                load_floats(row, x_type, k, count, count, buffer);
                const float here = largest(buffer, count);
                if (!(here <= token_largest)) token_largest = here;
            }
        }
        load_floats(row, x_type, start, h.columns, valid, buffer);
        char *to = values + t * h.planes * h.stride + int64_t(start) * (h.kind == A8 ? 1 : h.kind == A32 ? 4 : 2);
        float *scale = scales + i * h.rows + t * h.planes;
        int32_t *sum = sums + i * h.rows + t * h.planes;
        if (h.kind == A32) {
            std::memcpy(to, buffer, sizeof(float) * h.columns);
        } else if (h.kind == B16) {
            uint16_t bits[128];
            float total = 0;
            for (int c = 0; c < h.columns; ++c) {
                const int place = (c & ~3) | (c & 1) << 1 | (c >> 1 & 1);
                bits[place] = float_to_bfloat(buffer[c]);
                total += bfloat_to_float(bits[place]);
            }
            std::memcpy(to, bits, 2 * h.columns);
            *scale = total;
        } else if (h.kind == A8) {
            const float most = compute == INT8_TOKEN ? token_largest : largest(buffer, h.columns);
            *scale = most / 127.f;
            *sum = to_int8(buffer, h.columns, most > 0 ? 127.f / most : 0.f, reinterpret_cast<int8_t *>(to));
        } else {
            const float most = largest(buffer, h.columns);
            int exponent = int(float_to_bits(most) >> 23) - 127;
            exponent = exponent < -110 ? -110 : exponent;
            const bool finite = exponent < 128;
            const float inverse = finite ? bits_to_float(uint32_t(127 + 14 - exponent) << 23) : 0.f;
            *scale = finite ? bits_to_float(uint32_t(127 - 14 + exponent) << 23) : most;
            *sum = to_int16(buffer, h.columns, inverse, reinterpret_cast<int16_t *>(to), rest);
            if (h.planes == 2) {
                scale[1] = *scale * (1.f / 32768.f);
                sum[1] = to_int16(rest, h.columns, 1.f, reinterpret_cast<int16_t *>(to + h.stride), buffer);
            }
        }
    }
}

// Sixteen outputs of every token, accumulators [rows][16], to y.
inline void write_rows(const Weight &w, const float *acc, int planes, int64_t t0, int64_t t1, int block, void *y,
                       int y_type, int64_t ldy) {
    const int n0 = block * ROWS, count = w.n - n0 < ROWS ? w.n - n0 : ROWS;
    alignas(64) float out[ROWS], bias[ROWS] = {};
    if (w.bias) std::memcpy(bias, w.bias + n0, sizeof(float) * count);
    for (int64_t t = t0; t < t1; ++t, acc += ROWS * planes) {
        for (int r = 0; r < ROWS; ++r)
            out[r] = (planes == 2 ? acc[r] + acc[ROWS + r] : acc[r]) * w.scale_factor + bias[r];
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

// One unit and the scales that go with it.
struct Unit {
    const uint8_t *codes, *scales;
    bool wide;
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

// Table weights in plain fp32: a unit to a panel [columns][16], then every row of activations.
inline void table_rows(const Weight &w, const Unit &u, const Activations &a, int i, int64_t r0, int64_t r1,
                       float *acc) {
    alignas(64) float panel[128 * ROWS], scale[ROWS], zero[ROWS];
    const float *values = table_values(w.table);
    read_scales(u, scale, zero);
    for (int k = 0; k < a.columns; ++k)
        for (int r = 0; r < ROWS; ++r) {
            const int j = r * 4 + k % 4;
            const int code = w.bits == 8 ? u.codes[k / 4 * 64 + j] : u.codes[k / 8 * 64 + j] >> (k / 4 % 2 * 4) & 15;
            panel[k * ROWS + r] = values[code] * scale[r];
        }
    for (int64_t row = r0; row < r1; ++row, acc += ROWS) {
        const float *x = reinterpret_cast<const float *>(a.at(row, i));
        alignas(64) float sum[ROWS] = {};
        for (int k = 0; k < a.columns; ++k)
            for (int r = 0; r < ROWS; ++r) sum[r] += x[k] * panel[k * ROWS + r];
        for (int r = 0; r < ROWS; ++r) acc[r] += sum[r];
    }
}

inline void prefetch(const uint8_t *from, size_t bytes) {
#if defined(__GNUC__)
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
#else
    (void)from, (void)bytes;
#endif
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
    for (int64_t r0 = 0; r0 < rows; r0 += TOKEN_BLOCK) {
        const int64_t r1 = rows - r0 < TOKEN_BLOCK ? rows : r0 + TOKEN_BLOCK;
        for (int b = b0; b < b1; b += streams) {
            const int live = b1 - b < streams ? b1 - b : streams;
            const size_t acc_stride = size_t(r1 - r0) * ROWS;
            std::memset(acc, 0, sizeof(float) * acc_stride * live);
            const uint8_t *start = w.units + b * block;
            for (int i = 0; i < a.chunks; ++i)
                for (int s = 0; s < live; ++s) {
                    const uint8_t *codes = start + s * block + head + i * unit;
                    if (tuning.prefetch) prefetch(codes + tuning.prefetch, unit);
                    const Unit u{codes, head ? start + s * block : codes + code_bytes(w), w.wide_scales != 0};
                    if constexpr (KIND == A32)
                        table_rows(w, u, a, i, r0, r1, acc + s * acc_stride);
                    else
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
void run_part_with(const Weight &w, const void *scratch, int64_t m, void *y, int y_type, int64_t ldy, int part,
                   int parts, Tuning tuning) {
    const Activations a = open_scratch(scratch);
    const int blocks = row_blocks(w);
    const int b0 = int(int64_t(blocks) * part / parts), b1 = int(int64_t(blocks) * (part + 1) / parts);
    if (a.kind == A8)
        run_kind<K, A8>(w, a, m, y, y_type, ldy, b0, b1, tuning);
    else if (a.kind == A16)
        run_kind<K, A16>(w, a, m, y, y_type, ldy, b0, b1, tuning);
    else if (a.kind == B16)
        run_tiles<K>(w, a, m, y, y_type, ldy, b0, b1, tuning);
    else
        run_blocks<K, 0, A32, 0>(w, a, m, y, y_type, ldy, b0, b1, tuning);
}

}  // namespace
}  // namespace qk
