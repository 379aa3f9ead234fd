// Weights stored by table, in fp32: codes become vectors of values in registers, and a broadcast activation times such
// a vector is added to the sums.
//
// A decoder D stands for a table on an instruction set. It takes the 16 rows in BANDS bands, of a line of 64 bytes one
// band at a time, in STEPS steps; a step gives PARTS vectors that go with one broadcast of OPERAND activations, whose
// columns lie side by side in the lanes. `rows` makes sums of whole rows of them.
#pragma once

#include "linear.h"

namespace qk {
namespace {

// A unit's values, decoded once for many tokens and then read as D decodes.
template <class D>
struct Panel {
    using Line = const float *;
    static constexpr int STEP = D::PARTS * D::LANES, LINE = D::STEPS * STEP;
    int lines;
    alignas(64) float values[128 * ROWS];

    Panel(const D &d, const uint8_t *codes, int count) : lines(count) {
        float *to = values;
        for (int band = 0; band < D::BANDS; ++band)
            for (int line = 0; line < lines; ++line) {
                const typename D::Line raw = d.load(codes, line, band);
QK_UNROLL(8)
                for (int step = 0; step < D::STEPS; ++step) {
                    typename D::Vector value[D::PARTS];
                    d.decode(raw, step, value);
                    for (int p = 0; p < D::PARTS; ++p, to += D::LANES) D::store(to, value[p]);
                }
            }
    }
    Line load(const uint8_t *, int line, int band) const { return values + (band * lines + line) * LINE; }
    void decode(Line line, int step, typename D::Vector *value) const {
        for (int p = 0; p < D::PARTS; ++p) value[p] = D::load_floats(line + step * STEP + p * D::LANES);
    }
};

// T tokens over a band of a unit whose values a D or a Panel gives. CHAINS sums for each result where there are few: a
// product must not wait for the one before.
template <class D, int T, class S>
QK_INLINE void table_band(const S &source, const Unit &u, const float *const *x, int lines, int band, float *acc) {
    constexpr int FEW = T * D::PARTS, CHAINS = FEW <= 2 ? (D::STEPS < 4 / FEW ? D::STEPS : 4 / FEW) : 1;
    constexpr int VECTORS = ROWS / D::LANES / D::BANDS;
    typename D::Vector sum[CHAINS][T][D::PARTS], out[VECTORS];
    for (int c = 0; c < CHAINS; ++c)
        for (int t = 0; t < T; ++t)
            for (int p = 0; p < D::PARTS; ++p) sum[c][t][p] = D::zero();
    for (int line = 0; line < lines; ++line) {
        const auto raw = source.load(u.codes, line, band);
QK_UNROLL(8)
        for (int step = 0; step < D::STEPS; ++step) {
            typename D::Vector value[D::PARTS];
            source.decode(raw, step, value);
QK_UNROLL(8)
            for (int t = 0; t < T; ++t) {
                const typename D::Vector operand = D::broadcast(x[t] + (line * D::STEPS + step) * D::OPERAND);
                for (int p = 0; p < D::PARTS; ++p)
                    sum[step % CHAINS][t][p] = D::multiply_add(value[p], operand, sum[step % CHAINS][t][p]);
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int c = 1; c < CHAINS; ++c)
            for (int p = 0; p < D::PARTS; ++p) sum[0][t][p] = D::add(sum[0][t][p], sum[c][t][p]);
        D::rows(sum[0][t], out);
        for (int v = 0; v < VECTORS; ++v) {
            float *to = acc + t * ROWS + (band * VECTORS + v) * D::LANES;
            D::store(to, D::multiply_add(out[v], D::scales(u, band * VECTORS + v), D::load_floats(to)));
        }
    }
}

template <class D, int T, class S>
QK_APART void table_tokens(const S &source, const Unit &u, const Activations &a, int lines, int i, int64_t row,
                           float *acc) {
    const float *x[T];
    for (int t = 0; t < T; ++t) x[t] = reinterpret_cast<const float *>(a.at<A32>(row + t, i));
QK_UNROLL(1)
    for (int band = 0; band < D::BANDS; ++band) table_band<D, T>(source, u, x, lines, band, acc);
}

// Tokens [r0, r1), T at a time, then what is left of them.
template <class D, int T, class S>
void table_blocks(const S &source, const Unit &u, const Activations &a, int lines, int i, int64_t r0, int64_t r1,
                  float *acc) {
    for (; r0 + T <= r1; r0 += T, acc += T * ROWS) table_tokens<D, T>(source, u, a, lines, i, r0, acc);
    if constexpr (T > 1)
        if (r0 < r1) table_blocks<D, T - 1>(source, u, a, lines, i, r0, r1, acc);
}

// Up to D::DECODED tokens share a value while it is in a register, more share it from a panel, D::TOKENS at a time.
// The products from a panel read nothing from memory for long; meanwhile the next unit comes.
template <class D>
void table_rows(const Unit &u, const Activations &a, int i, int64_t r0, int64_t r1, float *acc) {
    const D decoder;
    const int lines = a.columns * D::BITS / 32;
    if (r1 - r0 <= D::DECODED) return table_blocks<D, D::DECODED>(decoder, u, a, lines, i, r0, r1, acc);
    const Panel<D> panel(decoder, u.codes, lines);
    prefetch(u.codes + lines * 64, size_t(lines + 1) * 64);
    table_blocks<D, D::TOKENS>(panel, u, a, lines, i, r0, r1, acc);
}

}  // namespace
}  // namespace qk
