// The prepared activations: a scratch that other weights can read too (`same_activations`).
//
// Included by one source per instruction set, so everything here is in an unnamed namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"
#include "half.h"

namespace qk {
namespace {

enum Kind : int32_t {
    A8,   // int8
    A16,  // int16, scaled by powers of two; fp32 inputs become two rows, the second what the first left over
    A32,  // fp32, for NF4 and FP8; for FP8 each four columns in the order of int16
    B16,  // bf16 as it came, for bf16 tiles, in the order of int16; `scale` holds the chunk's sum
};

// The scratch: this header (64 bytes), values [rows][stride], scale [chunks][rows], sum [chunks][rows].
struct Header {
    int32_t kind, planes, chunks, columns;  // columns of a chunk
    int64_t rows, stride;                   // rows = m * planes, from 9 on whole tiles of 16; stride in bytes
};

struct Activations : Header {
    const char *values;
    const float *scale;
    const int32_t *sum;
    // Row and chunk of activations of a kind; C: their columns where they are known, else 0.
    template <int KIND, int C = 0>
    const char *at(int64_t row, int i) const {
        return values + row * stride + int64_t(i) * (C ? C : columns) * (KIND == A8 ? 1 : KIND == A32 ? 4 : 2);
    }
};

inline size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

inline int64_t padded_rows(int64_t rows) { return rows <= 8 ? rows : (rows + 15) / 16 * 16; }

inline Header describe(const Weight &w, int x_type, int64_t m, int compute, bool tiles) {
    Header h;
    const bool bfloats = x_type == BF16 || (x_type == F32 && compute == HALVES);
    h.kind = in_floats(w) ? A32 : w.table ? A16 : is_int8(compute) ? A8 : tiles && bfloats && m >= 16 ? B16 : A16;
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

// rne(x / scale + zero) within -128..127; 0 from `valid` on. A scale that is no positive number gives zeros.
inline int32_t to_range(const float *x, int count, int valid, float scale, int32_t zero, int8_t *out) {
    const bool any = scale > 0 && scale < INFINITY;
    const float step = any ? scale : 1.f, shift = float(zero);
    int32_t sum = 0;
    for (int i = 0; i < count; ++i) {
        float level = x[i] / step + shift;
        level = level < -128.f ? -128.f : level < 127.f ? level : 127.f;
        const int8_t q = int8_t(any && i < valid ? round_to_int(level) : 0);
        out[i] = q;
        sum += q;
    }
    return sum;
}

// A value as the type of x holds it, fp32 again.
inline float as_type(float value, int x_type) {
    return x_type == F32 ? value
           : x_type == BF16 ? bfloat_to_float(float_to_bfloat(value)) : half_to_float(float_to_half(value));
}

// The scale of activations whose largest is `most`, in the type of x; the smallest step above 1 where that is zero.
inline float fp8_scale(float most, int x_type) {
    const float scale = as_type(most / 448.f, x_type);
    return scale != 0 ? scale : x_type == F32 ? 0x1p-23f : x_type == BF16 ? 0x1p-7f : 0x1p-10f;
}

// The nearest FP8 E4M3 of |x| <= 448, halves to even; a NaN stays one.
inline float nearest_fp8(float x) {
    const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffff;
    const float normal = bits_to_float((bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000);
    constexpr float STEPS = 24576.f;  // 1.5 * 2^14: its last bit is 2^-9, the step below 2^-6
    const float small = (x + STEPS) - STEPS;
    return magnitude > 0x7f800000 ? x : magnitude < 0x3c800000 ? small : normal;
}

// x becomes e4m3(x / scale) scale; every step is rounded to the type of x.
inline void round_to_fp8(float *x, int count, float scale, int x_type) {
    for (int i = 0; i < count; ++i) {
        float level = as_type(x[i] / scale, x_type);
        level = level < -448.f ? -448.f : level > 448.f ? 448.f : level;
        x[i] = as_type(nearest_fp8(level) * scale, x_type);
    }
}

// Where column c goes when the columns of each four are in the order 0, 2, 1, 3: a pair of them then belongs to the
// even or the odd bytes of four codes.
inline int place(int c) { return (c & ~3) | (c & 1) << 1 | (c >> 1 & 1); }

// int16 activations are at most this large: a chunk's sums of products, each times 256, fit in 32 bits (AVX2).
constexpr int32_t MOST16 = 1 << 14;

// int16 in the order of `place`. `rest` gets what is left, times 2^15.
inline int32_t to_int16(const float *x, int count, float inverse, int16_t *out, float *rest) {
    int32_t sum = 0;
    int16_t plain[128];
    for (int i = 0; i < count; ++i) {
        const float scaled = x[i] * inverse;
        int32_t q = round_to_int(scaled);
        q = q > MOST16 ? MOST16 : q < -MOST16 ? -MOST16 : q;
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
        const bool whole = compute == INT8_TOKEN || compute == INT8_RANGE || compute == FP8_RANGE;
        if (whole && token != t) {
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
        if (is_fp8(compute)) {
            float scale = w.input_scale ? as_type(w.input_scale, x_type) : fp8_scale(token_largest, x_type);
            if (compute == FP8_GROUP) {
                const int from = start & ~127, count = w.k - from < 128 ? w.k - from : 128;
                load_floats(row, x_type, from, count, count, rest);
                scale = fp8_scale(largest(rest, count), x_type);
            }
            round_to_fp8(buffer, valid, scale, x_type);
        }
        char *to = values + t * h.planes * h.stride + int64_t(start) * (h.kind == A8 ? 1 : h.kind == A32 ? 4 : 2);
        float *scale = scales + i * h.rows + t * h.planes;
        int32_t *sum = sums + i * h.rows + t * h.planes;
        if (h.kind == A32) {
            auto *out = reinterpret_cast<float *>(to);
            for (int c = 0; c < h.columns; ++c) out[w.bits == 8 ? place(c) : c] = buffer[c];
        } else if (h.kind == B16) {
            uint16_t bits[128];
            float total = 0;
            for (int c = 0; c < h.columns; ++c) {
                bits[place(c)] = float_to_bfloat(buffer[c]);
                total += bfloat_to_float(bits[place(c)]);
            }
            std::memcpy(to, bits, 2 * h.columns);
            *scale = total;
        } else if (compute == INT8_RANGE) {
            const float own = token_largest / 127.5f;
            *scale = !w.input_scale ? own : token_largest != token_largest ? token_largest : w.input_scale;
            *sum = to_range(buffer, h.columns, valid, *scale, w.input_zero, reinterpret_cast<int8_t *>(to));
        } else if (h.kind == A8) {
            const float most = compute == INT8_TOKEN ? token_largest : largest(buffer, h.columns);
            *scale = most / 127.f;
            *sum = to_int8(buffer, h.columns, most > 0 ? 127.f / most : 0.f, reinterpret_cast<int8_t *>(to));
        } else {
            const float most = largest(buffer, h.columns);
            int exponent = int(float_to_bits(most) >> 23) - 127;
            exponent = exponent < -110 ? -110 : exponent;
            const bool finite = exponent < 128;
            const float inverse = finite ? bits_to_float(uint32_t(127 + 13 - exponent) << 23) : 0.f;
            *scale = finite ? bits_to_float(uint32_t(127 - 13 + exponent) << 23) : most;
            *sum = to_int16(buffer, h.columns, inverse, reinterpret_cast<int16_t *>(to), rest);
            if (h.planes == 2) {
                scale[1] = *scale * (1.f / 32768.f);
                sum[1] = to_int16(rest, h.columns, 1.f, reinterpret_cast<int16_t *>(to + h.stride), buffer);
            }
        }
    }
}

}  // namespace
}  // namespace qk
