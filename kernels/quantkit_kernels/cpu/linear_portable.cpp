// The path that any compiler vectorizes: a unit's codes as int16 [columns][16], then sums over 16 lanes.
#include "linear.h"

namespace qk {
namespace {

struct Line {  // a line of 64 bytes as 16 dwords
    struct type {
        uint32_t lane[ROWS];
    };
    static type load(const uint8_t *from) {
        type v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }
    template <class F>
    static type map(type v, F f) {
        for (auto &lane : v.lane) lane = f(lane);
        return v;
    }
    static type right(type v, int n) { return map(v, [n](uint32_t x) { return x >> n; }); }
    static type left(type v, int n) { return map(v, [n](uint32_t x) { return x << n; }); }
    static type bits(type v, uint32_t mask) { return map(v, [mask](uint32_t x) { return x & mask * 0x01010101u; }); }
    static type either(type v, const type &o) {
        for (int r = 0; r < ROWS; ++r) v.lane[r] |= o.lane[r];
        return v;
    }
};

struct Portable {
    static constexpr bool TILES = false;
    template <int BITS, int KIND, int>
    static void rows(const Unit &u, const Activations &a, int i, int64_t r0, int64_t r1, float *acc) {
        if constexpr (KIND == A32)
            table_unit<BITS>(u, a, i, r0, r1, acc);
        else if constexpr (BITS == E2M1)
            fp4_unit(u, a, i, r0, r1, acc);
        else
            unit<BITS, KIND>(u, a, i, r0, r1, acc);
    }

    template <int BITS>
    static void table_unit(const Unit &u, const Activations &a, int i, int64_t r0, int64_t r1, float *acc) {
        alignas(64) float panel[128 * ROWS], scale[ROWS], zero[ROWS];
        const float *values = table_values(BITS == 8 ? FP8 : NF4);
        read_scales(u, scale, zero);
        for (int q = 0; q < a.columns / 4; ++q) {
            const Line::type codes = quad<BITS, Line>(u.codes, a.columns, q / 8, q % 8, 0);
            for (int j = 0; j < 4; ++j) {
                float *to = panel + (BITS == 8 ? place(4 * q + j) : 4 * q + j) * ROWS;
                for (int r = 0; r < ROWS; ++r) to[r] = values[codes.lane[r] >> (8 * j) & 255];
            }
        }
        for (int64_t row = r0; row < r1; ++row, acc += ROWS) {
            const float *x = reinterpret_cast<const float *>(a.at<A32>(row, i));
            alignas(64) float sum[ROWS] = {};
            for (int k = 0; k < a.columns; ++k)
                for (int r = 0; r < ROWS; ++r) sum[r] += x[k] * panel[k * ROWS + r];
            for (int r = 0; r < ROWS; ++r) acc[r] += sum[r] * scale[r];
        }
    }

    // Scale of a group of a row; of 4 groups, times 2^-8.
    static float part_scale(const Unit &u, int part, int row) {
        if (u.parts == 4) return half_to_float(uint16_t(u.scales[16 * part + row] << 7));
        float wide;
        uint16_t half;
        std::memcpy(&half, u.scales + 32 * part + 2 * row, 2);
        if (!u.wide) return half_to_float(half);
        std::memcpy(&wide, u.scales + 64 * part + 4 * row, 4);
        return wide;
    }

    static void fp4_unit(const Unit &u, const Activations &a, int i, int64_t r0, int64_t r1, float *acc) {
        alignas(64) int16_t panel[128 * ROWS];
        alignas(64) float scale[4][ROWS];
        const int group = a.columns / u.parts;
        for (int q = 0; q < a.columns / 4; ++q) {
            const Line::type codes = quad<4, Line>(u.codes, a.columns, q / 8, q % 8, 0);
            for (int j = 0; j < 4; ++j)
                for (int r = 0; r < ROWS; ++r)
                    panel[place(4 * q + j) * ROWS + r] = FP4_TWICE[codes.lane[r] >> (8 * j) & 15];
        }
        for (int p = 0; p < u.parts; ++p)
            for (int r = 0; r < ROWS; ++r) scale[p][r] = part_scale(u, p, r);
        for (int64_t row = r0; row < r1; ++row, acc += ROWS) {
            const int16_t *x = reinterpret_cast<const int16_t *>(a.at<A16>(row, i));
            for (int p = 0; p < u.parts; ++p) {
                alignas(64) int32_t sum[ROWS] = {};
                for (int k = p * group; k < (p + 1) * group; ++k)
                    for (int r = 0; r < ROWS; ++r) sum[r] += x[k] * panel[k * ROWS + r];
                for (int r = 0; r < ROWS; ++r) acc[r] += float(sum[r]) * (scale[p][r] * a.scale[i * a.rows + row]);
            }
        }
    }

    template <int BITS, int KIND>
    static void unit(const Unit &u, const Activations &a, int i, int64_t r0, int64_t r1, float *acc) {
        alignas(64) int16_t panel[128 * ROWS];
        const int columns = a.columns;
        alignas(64) float scale[ROWS], zero[ROWS];
        read_scales(u, scale, zero);
        for (int q = 0; q < columns / 4; ++q) {
            const Line::type codes = quad<BITS, Line>(u.codes, columns, q / 8, q % 8, 0);
            for (int j = 0; j < 4; ++j) {
                // int16 activations come in the order 0, 2, 1, 3.
                int16_t *to = panel + (KIND == A16 ? place(4 * q + j) : 4 * q + j) * ROWS;
                for (int r = 0; r < ROWS; ++r) to[r] = int16_t(codes.lane[r] >> (8 * j) & 255);
            }
        }
        for (int64_t row = r0; row < r1; ++row, acc += ROWS) {
            alignas(64) int32_t sum[ROWS] = {};
            const char *x = a.at<KIND>(row, i);
            for (int k = 0; k < columns; ++k) {
                const int32_t value =
                    KIND == A8 ? reinterpret_cast<const int8_t *>(x)[k] : reinterpret_cast<const int16_t *>(x)[k];
                for (int r = 0; r < ROWS; ++r) sum[r] += value * panel[k * ROWS + r];
            }
            const float s = a.scale[i * a.rows + row];
            const int32_t total = a.sum[i * a.rows + row];
            for (int r = 0; r < ROWS; ++r) acc[r] += float(sum[r] - int32_t(zero[r]) * total) * (scale[r] * s);
        }
    }
};

void prepare_any(const Weight &w, const void *x, int x_type, int64_t ldx, int64_t m, int compute, void *scratch,
                 int part, int parts) {
    prepare(w, x, x_type, ldx, m, compute, scratch, part, parts, false);
}

}  // namespace

const Path path_portable = {prepare_any, run_with<Portable>};

}  // namespace qk
