// The packed layout, and the way between it and the tensors on disk.
//
// N is cut in blocks of 16 rows (padded rows have scale 0), K in chunks of C columns (padded with code 0 and
// activation 0): C = group for groups of 32 and 64, else 128. A unit is 16 rows x C columns, in lines of 64 bytes
// whose dword lane r is row r; byte j of a dword holds
//   8 bits: line i: column 4i+j
//   4 bits: line i: low nibble column 8i+j, high nibble 8i+4+j
//   2 bits: line i: columns 16i+j, 16i+4+j, 16i+8+j, 16i+12+j from the low bits up
//   3 bits: C/16 lines with the two low bits as above, then C/32 lines: bit b of line i is column 32i+4b+j's
// followed by a scale line: 16 fp16 scales and 16 fp16 zeros (wide: 16 fp32 scales, 16 fp16 zeros, 32 bytes of
// padding). Per channel there is one scale line in front of the block's units instead. Codes of a table have no zero
// point; there it is 0, or NaN where the scale goes with a code that is NaN, so that kernels need not look at each.
// FP4 in groups of 16 and 32 columns has the scales of several groups there: C is 4 groups, whose 16 FP8 scales follow
// each other, or 2 groups with 16 fp16 (wide: fp32) scales each.
#include "common.h"

#include <cstring>

#include "half.h"

namespace qk {

bool supported(const Weight &w) {
    const bool bits = w.bits == 2 || w.bits == 3 || w.bits == 4 || w.bits == 8;
    const bool small = w.group == 32 || w.group == 64 || (w.group == 16 && w.table == FP4);
    const bool group = w.group > 0 && (w.group == w.k || small || w.group % 128 == 0);
    const int of_table[] = {w.bits, 4, 8, 4};
    const bool table = w.table >= INTEGERS && w.table <= FP4 && w.bits == of_table[w.table];
    const bool sizes = w.n > 0 && w.k > 0 && group && w.k % w.group == 0;
    return bits && table && sizes && (w.scale_type != SCALES_F8 || parts(w) == 4);
}

size_t weight_bytes(const Weight &w) { return supported(w) ? row_blocks(w) * block_bytes(w) : 0; }

namespace {

float fp8_e4m3(int code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 127) == 127) return bits_to_float(0x7fc00000);
    const float magnitude =
        exponent ? bits_to_float(uint32_t(exponent + 120) << 23 | uint32_t(mantissa) << 20) : mantissa / 512.f;
    return code & 128 ? -magnitude : magnitude;
}

// Whether one of four FP8 codes is NaN.
bool any_nan(uint32_t four) {
    return ((four & 0x7f7f7f7f) + 0x01010101) & 0x80808080;  // of 127 the sum has the upper bit
}

// Four codes from `index` on (a multiple of 4) of a row's bit string, a byte each; only the first `valid` exist.
uint32_t get_four(const uint8_t *stream, int64_t index, int bits, int valid) {
    const int64_t at = index * bits;
    const int shift = int(at & 7), end = shift + valid * bits;
    uint64_t window = 0;
    for (int i = 0; 8 * i < end; ++i) window |= uint64_t(stream[(at >> 3) + i]) << (8 * i);
    uint32_t four = 0;
    for (int j = 0; j < valid; ++j)
        four |= uint32_t(window >> (shift + j * bits) & ((1u << bits) - 1)) << (8 * j);
    return four;
}

void or_four(uint8_t *stream, int64_t index, int bits, int valid, uint32_t four) {
    const int64_t at = index * bits;
    const int shift = int(at & 7), end = shift + valid * bits;
    uint64_t window = 0;
    for (int j = 0; j < valid; ++j) window |= uint64_t(four >> (8 * j) & 255) << (shift + j * bits);
    for (int i = 0; 8 * i < end; ++i) stream[(at >> 3) + i] |= uint8_t(window >> (8 * i));
}

uint32_t get_lane(const uint8_t *unit, int line, int row) {
    uint32_t lane;
    std::memcpy(&lane, unit + line * 64 + row * 4, 4);
    return lane;
}

void or_lane(uint8_t *unit, int line, int row, uint32_t value) {
    const uint32_t lane = get_lane(unit, line, row) | value;
    std::memcpy(unit + line * 64 + row * 4, &lane, 4);
}

// The codes of columns 4q .. 4q+3 of one row of a unit of `columns`, a byte each.
uint32_t get_quad(const uint8_t *unit, int columns, int bits, int row, int q) {
    if (bits == 8) return get_lane(unit, q, row);
    if (bits == 4) return get_lane(unit, q / 2, row) >> (q % 2 * 4) & 0x0f0f0f0f;
    const uint32_t low = get_lane(unit, q / 4, row) >> (q % 4 * 2) & 0x03030303;
    if (bits == 2) return low;
    return low | (get_lane(unit, columns / 16 + q / 8, row) >> (q % 8) & 0x01010101) << 2;
}

void or_quad(uint8_t *unit, int columns, int bits, int row, int q, uint32_t four) {
    if (bits == 8) return or_lane(unit, q, row, four);
    if (bits == 4) return or_lane(unit, q / 2, row, four << (q % 2 * 4));
    or_lane(unit, q / 4, row, (four & 0x03030303) << (q % 4 * 2));
    if (bits == 3) or_lane(unit, columns / 16 + q / 8, row, (four >> 2 & 0x01010101) << (q % 8));
}

// The code of a positive number that FP8 has.
uint8_t exact_fp8(float value) {
    return uint8_t(value < 0x1p-6f ? value * 512.f : (float_to_bits(value) >> 20) - (120 << 3));
}

void put_scale(uint8_t *line, int type, int part, int row, float scale) {
    if (type == SCALES_F32) {
        std::memcpy(line + 64 * part + 4 * row, &scale, 4);
    } else if (type == SCALES_F16) {
        const uint16_t half = float_to_half(scale);
        std::memcpy(line + 32 * part + 2 * row, &half, 2);
    } else {
        line[16 * part + row] = exact_fp8(scale);
    }
}

float get_scale(const uint8_t *line, int type, int part, int row) {
    if (type == SCALES_F8) return fp8_e4m3(line[16 * part + row]);
    if (type == SCALES_F32) {
        float scale;
        std::memcpy(&scale, line + 64 * part + 4 * row, 4);
        return scale;
    }
    uint16_t half;
    std::memcpy(&half, line + 32 * part + 2 * row, 2);
    return half_to_float(half);
}

void put_zero(uint8_t *line, int type, int row, float zero) {
    const uint16_t half = float_to_half(zero);
    std::memcpy(line + (type == SCALES_F32 ? 64 : 32) + 2 * row, &half, 2);
}

float get_zero(const uint8_t *line, int type, int row) {
    uint16_t half;
    std::memcpy(&half, line + (type == SCALES_F32 ? 64 : 32) + 2 * row, 2);
    return half_to_float(half);
}

// Where row block `block` keeps the scales of chunk `i`.
size_t scale_at(const Weight &w, int block, int i) {
    const size_t start = block * block_bytes(w);
    return per_channel(w) ? start : start + i * unit_bytes(w) + code_bytes(w);
}

size_t unit_at(const Weight &w, int block, int i) {
    return block * block_bytes(w) + (per_channel(w) ? scale_bytes(w) : 0) + i * unit_bytes(w);
}

size_t words(int64_t columns, int bits) { return (columns * bits + 31) / 32; }

void pack_block(const Weight &w, uint8_t *units, const int32_t *packed, const float *scale, const int32_t *zeros,
                int block) {
    const int c = chunk(w), groups = w.k / w.group;
    bool nan[ROWS] = {};
    for (int i = 0; i < chunks(w); ++i) {
        uint8_t *unit = units + unit_at(w, block, i), *line = units + scale_at(w, block, i);
        std::memset(unit, 0, code_bytes(w));
        std::memset(line, 0, scale_bytes(w));
        for (int row = 0; row < ROWS && block * ROWS + row < w.n; ++row) {
            const int n = block * ROWS + row, g = i * c / w.group;
            const auto *stream = reinterpret_cast<const uint8_t *>(packed + n * words(w.k, w.bits));
            nan[row] = nan[row] && per_channel(w);
            for (int q = 0; q < c / 4 && i * c + 4 * q < w.k; ++q) {
                const int column = i * c + 4 * q, valid = w.k - column < 4 ? w.k - column : 4;
                uint32_t four;
                if (w.bits == 8 && valid == 4) {
                    std::memcpy(&four, stream + column, 4);
                    std::memcpy(unit + 64 * q + 4 * row, &four, 4);
                } else {
                    four = get_four(stream, column, w.bits, valid);
                    or_quad(unit, c, w.bits, row, q, four);
                }
                nan[row] = nan[row] || (w.table == FP8 && any_nan(four));
            }
            float zero = !w.table ? float(1 << (w.bits - 1)) : nan[row] ? bits_to_float(0x7fc00000) : 0.f;
            if (zeros && !w.table) {  // bit strings run down the columns of [words, groups]
                uint32_t pair[2] = {0, 0};
                const int64_t word = int64_t(n) * w.bits / 32;
                pair[0] = uint32_t(zeros[word * groups + g]);
                if (word + 1 < int64_t(words(w.n, w.bits))) pair[1] = uint32_t(zeros[(word + 1) * groups + g]);
                const uint64_t both = pair[0] | uint64_t(pair[1]) << 32;
                zero = float(both >> (int64_t(n) * w.bits % 32) & ((1u << w.bits) - 1));
            }
            for (int p = 0; p < parts(w) && i * c + p * w.group < w.k; ++p)
                put_scale(line, w.scale_type, p, row, scale[int64_t(n) * groups + g + p]);
            if (w.table != FP4) put_zero(line, w.scale_type, row, zero);
        }
    }
}

}  // namespace

const float *table_values(int table) {
    // QLoRA (Dettmers et al. 2023), appendix E: quantiles of the normal distribution.
    static const float nf4[16] = {-1.f,
                                  -0.6961928009986877f,
                                  -0.5250730514526367f,
                                  -0.39491748809814453f,
                                  -0.28444138169288635f,
                                  -0.18477343022823334f,
                                  -0.09105003625154495f,
                                  0.f,
                                  0.07958029955625534f,
                                  0.16093020141124725f,
                                  0.24611230194568634f,
                                  0.33791524171829224f,
                                  0.44070982933044434f,
                                  0.5626170039176941f,
                                  0.7229568362236023f,
                                  1.f};
    struct Fp8 {
        float value[256];
        Fp8() {
            for (int code = 0; code < 256; ++code) value[code] = fp8_e4m3(code);
        }
    };
    static const Fp8 fp8;
    return table == NF4 ? nf4 : fp8.value;
}

}  // namespace qk

using namespace qk;

extern "C" size_t qk_weight_bytes(const qk_weight *w) { return weight_bytes(*w); }

extern "C" void qk_pack(const qk_weight *w, uint8_t *units, const int32_t *packed, const float *scale,
                        const int32_t *zero_packed) {
#pragma omp parallel for schedule(static)
    for (int block = 0; block < row_blocks(*w); ++block) pack_block(*w, units, packed, scale, zero_packed, block);
}

extern "C" void qk_unpack(const qk_weight *w, int32_t *packed, float *scale, int32_t *zero_packed) {
    const int c = chunk(*w), groups = w->k / w->group;
    std::memset(packed, 0, 4 * w->n * words(w->k, w->bits));
    if (zero_packed) std::memset(zero_packed, 0, 4 * groups * words(w->n, w->bits));
    for (int n = 0; n < w->n; ++n) {
        auto *stream = reinterpret_cast<uint8_t *>(packed + n * words(w->k, w->bits));
        for (int i = 0; i < chunks(*w); ++i) {
            const uint8_t *unit = w->units + unit_at(*w, n / ROWS, i);
            for (int q = 0; q < c / 4 && i * c + 4 * q < w->k; ++q) {
                const int column = i * c + 4 * q, valid = w->k - column < 4 ? w->k - column : 4;
                or_four(stream, column, w->bits, valid, get_quad(unit, c, w->bits, n % ROWS, q));
            }
        }
        for (int g = 0; g < groups; ++g) {
            const int column = g * w->group, part = parts(*w) == 1 ? 0 : column % c / w->group;
            const uint8_t *line = w->units + scale_at(*w, n / ROWS, column / c);
            scale[int64_t(n) * groups + g] = get_scale(line, w->scale_type, part, n % ROWS);
            if (!zero_packed || w->table) continue;
            const float zero = get_zero(line, w->scale_type, n % ROWS);
            const int64_t at = int64_t(n) * w->bits;
            const uint64_t shifted = uint64_t(zero) << (at % 32);
            uint32_t word;
            int32_t *cell = zero_packed + at / 32 * groups + g;
            std::memcpy(&word, cell, 4);
            word |= uint32_t(shifted);
            std::memcpy(cell, &word, 4);
            if (shifted >> 32) {
                std::memcpy(&word, cell + groups, 4);
                word |= uint32_t(shifted >> 32);
                std::memcpy(cell + groups, &word, 4);
            }
        }
    }
}
