// Whether an instruction set's kernels compute what the portable ones do, asked once per process before they are used:
// a processor, a compiler or an emulator that gets an instruction wrong must not give a silently broken model.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "linear.h"

namespace qk {
namespace {

constexpr int N = 24, K = 256, MOST_TOKENS = 23;  // a ragged row block, two chunks, tiles and what is left of them

uint32_t next(uint32_t &state) { return state = state * 1664525u + 1013904223u; }

// What FP8 kernels may get wrong goes to rows of its own: row 1 has subnormal codes only, row 2 one NaN, which its zero
// point announces, and no other row has any.
void place_rare_codes(const Weight &w, std::vector<uint8_t> &units) {
    for (int b = 0; b < row_blocks(w); ++b)
        for (int i = 0; i < chunks(w); ++i) {
            uint8_t *unit = units.data() + b * block_bytes(w) + i * unit_bytes(w);
            for (size_t at = 0; at < code_bytes(w); ++at) {
                if (at / 4 % ROWS == 1) unit[at] &= 0x87;
                if ((unit[at] & 127) == 127) unit[at] ^= 1;
            }
            if (b || i) continue;
            const uint16_t nan = 0x7e00;
            unit[2 * 4 + 1] = 0xff;
            std::memcpy(unit + code_bytes(w) + 2 * (ROWS + 2), &nan, 2);
        }
}

// Any bytes are codes of some weight; scales and zero points must be numbers.
std::vector<uint8_t> random_units(Weight &w) {
    std::vector<uint8_t> units(weight_bytes(w));
    uint32_t state = uint32_t(w.bits);
    for (uint8_t &byte : units) byte = uint8_t(next(state) >> 24);
    for (int b = 0; b < row_blocks(w); ++b)
        for (int i = 0; i < chunks(w); ++i) {
            uint8_t *line = units.data() + b * block_bytes(w) + i * unit_bytes(w) + code_bytes(w);
            if (w.scale_type == SCALES_F8) {  // those of every exponent
                for (size_t at = 0; at < scale_bytes(w); ++at) line[at] = uint8_t(line[at] % 127);
                continue;
            }
            uint16_t halves[2 * ROWS];
            for (int r = 0; r < ROWS; ++r) {
                halves[r] = float_to_half(0.01f * float(r + 1));
                const uint32_t zero = next(state) >> 24 & ((1u << w.bits) - 1);
                halves[ROWS + r] = parts(w) == 2 ? float_to_half(0.02f * float(r + 1)) : float_to_half(float(zero));
                if (in_floats(w)) halves[ROWS + r] = 0;
            }
            std::memcpy(line, halves, sizeof halves);
        }
    if (w.table == FP8) place_rare_codes(w, units);
    w.units = units.data();
    return units;
}

std::vector<float> product(const Path &path, const Weight &w, const void *x, int x_type, int m, int compute) {
    std::vector<float> y(size_t(m) * w.n);
    void *scratch = nullptr;
    if (posix_memalign(&scratch, 64, scratch_bytes(w, m, compute))) return {};
    path.prepare(w, x, x_type, w.k, m, compute, scratch, 0, 1);
    path.run(w, scratch, m, y.data(), F32, w.n, 0, row_blocks(w), Tuning{2, 64});
    free(scratch);
    return y;
}

// The first tokens are the same bits.
bool same(const std::vector<float> &got, const std::vector<float> &wanted) {
    return !got.empty() && std::memcmp(got.data(), wanted.data(), 4 * got.size()) == 0;
}

// The first tokens differ by less than `limit` times what is usual in their row of the weight; NaN where it is wanted.
bool close(const std::vector<float> &got, const std::vector<float> &wanted, double limit) {
    for (size_t n = 0; n < N; ++n) {
        double error = 0, whole = 0;
        for (size_t i = n; i < wanted.size(); i += N) {
            if (std::isnan(wanted[i])) continue;
            whole += double(wanted[i]) * wanted[i] / MOST_TOKENS;
        }
        for (size_t i = n; i < got.size(); i += N) {
            if (std::isnan(got[i]) != std::isnan(wanted[i])) return false;
            if (!std::isnan(got[i])) error = std::max(error, std::fabs(double(got[i]) - wanted[i]));
        }
        if (!(error <= limit * std::sqrt(whole))) return false;
    }
    return !got.empty();
}

// Integers give the same bits in all paths, but for bf16 tiles, which round otherwise; NF4 and FP8 add in any order.
bool agrees(const Path &path, const Weight &w, const void *x, int x_type, int compute) {
    const std::vector<float> wanted = product(path_portable, w, x, x_type, MOST_TOKENS, compute);
    if (wanted.empty()) return false;
    for (int m : {1, 2, 4, 7, MOST_TOKENS}) {
        const std::vector<float> got = product(path, w, x, x_type, m, compute);
        const bool tiles = compute == FLOAT && x_type == BF16 && m >= 16 && !w.table;
        if (in_floats(w) ? !close(got, wanted, 1e-5) : tiles ? !close(got, wanted, 1e-2) : !same(got, wanted)) return false;
    }
    return true;
}

}  // namespace

bool agrees_with_portable(const Path &path) {
    std::vector<float> x(MOST_TOKENS * K);
    std::vector<uint16_t> halves(x.size());
    uint32_t state = 1;
    for (size_t i = 0; i < x.size(); ++i) {
        halves[i] = float_to_bfloat(float(int32_t(next(state))) * 0x1p-31f);
        x[i] = bfloat_to_float(halves[i]);
    }
    const int kinds[][4] = {{2, INTEGERS, 128, SCALES_F16}, {3, INTEGERS, 128, SCALES_F16},
                            {4, INTEGERS, 128, SCALES_F16}, {8, INTEGERS, 128, SCALES_F16},
                            {4, NF4, 128, SCALES_F16},      {8, FP8, 128, SCALES_F16},
                            {4, FP4, 128, SCALES_F16},      {4, FP4, 64, SCALES_F16},
                            {4, FP4, 32, SCALES_F16},       {4, FP4, 16, SCALES_F8}};
    for (const auto &[bits, table, group, scale_type] : kinds) {
        Weight w{nullptr, nullptr, 1.f, N, K, group, bits, scale_type, table, 0.f, 0};
        const std::vector<uint8_t> units = random_units(w);
        for (int compute : {FLOAT, INT8_GROUP, INT8_RANGE, FP8_RANGE}) {
            if ((table && is_int8(compute)) || (table != FP8 && compute == FP8_RANGE)) continue;
            if (!agrees(path, w, x.data(), F32, compute)) return false;
            if (!agrees(path, w, halves.data(), BF16, compute)) return false;
        }
    }
    return true;
}

}  // namespace qk
