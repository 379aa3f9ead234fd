// Whether an instruction set's kernels compute what the portable ones do, asked once per process before they are used:
// a processor, a compiler or an emulator that gets an instruction wrong must not give a silently broken model.
#include <cstdlib>
#include <vector>

#include "linear.h"

namespace qk {
namespace {

constexpr int N = 24, K = 256, MOST_TOKENS = 23;  // a ragged row block, two chunks, tiles and what is left of them

uint32_t next(uint32_t &state) { return state = state * 1664525u + 1013904223u; }

// Any bytes are codes of some weight; scales and zero points must be numbers.
std::vector<uint8_t> random_units(Weight &w) {
    std::vector<uint8_t> units(weight_bytes(w));
    uint32_t state = uint32_t(w.bits);
    for (uint8_t &byte : units) byte = uint8_t(next(state) >> 24);
    for (int b = 0; b < row_blocks(w); ++b)
        for (int i = 0; i < chunks(w); ++i) {
            uint16_t line[2 * ROWS];
            for (int r = 0; r < ROWS; ++r) {
                line[r] = float_to_half(0.01f * float(r + 1));
                line[ROWS + r] = float_to_half(float(next(state) >> 24 & ((1u << w.bits) - 1)));
            }
            std::memcpy(units.data() + b * block_bytes(w) + i * unit_bytes(w) + code_bytes(w), line, sizeof line);
        }
    w.units = units.data();
    return units;
}

std::vector<float> product(const Path &path, const Weight &w, const void *x, int x_type, int m, int compute) {
    std::vector<float> y(size_t(m) * w.n);
    void *scratch = nullptr;
    if (posix_memalign(&scratch, 64, scratch_bytes(w, m, compute))) return {};
    path.prepare(w, x, x_type, w.k, m, compute, scratch, 0, 1);
    path.run(w, scratch, m, y.data(), F32, w.n, 0, 1, Tuning{2, 64});
    free(scratch);
    return y;
}

// All paths give the same bits, but for bf16 tiles, which round otherwise.
bool alike(const std::vector<float> &got, const std::vector<float> &wanted, bool tiles) {
    if (got.size() != wanted.size()) return false;
    if (!tiles) return std::memcmp(got.data(), wanted.data(), 4 * got.size()) == 0;
    double error = 0, whole = 0;
    for (size_t i = 0; i < got.size(); ++i) {
        error += double(got[i] - wanted[i]) * (got[i] - wanted[i]);
        whole += double(wanted[i]) * wanted[i];
    }
    return error < 1e-4 * whole;
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
    for (int bits : {2, 3, 4, 8}) {
        Weight w{nullptr, nullptr, 1.f, N, K, 128, bits, 0, 0};
        const std::vector<uint8_t> units = random_units(w);
        for (int compute : {FLOAT, INT8_GROUP})
            for (int m : {1, 2, MOST_TOKENS})
                for (int type : {F32, BF16}) {
                    const void *from = type == F32 ? static_cast<const void *>(x.data()) : halves.data();
                    const auto wanted = product(path_portable, w, from, type, m, compute);
                    const bool tiles = compute == FLOAT && type == BF16 && m >= 16;
                    if (!alike(product(path, w, from, type, m, compute), wanted, tiles)) return false;
                }
    }
    return true;
}

}  // namespace qk
