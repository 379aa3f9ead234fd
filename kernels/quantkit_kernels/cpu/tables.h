// Weights stored by table, in fp32: codes become vectors of values in registers, and a broadcast activation times such
// a vector is added to the sums. Lanes are rows, so there is nothing to add across lanes but at the end of a unit.
//
// A decoder D stands for a table on an instruction set. It takes a line of 64 bytes in STEPS steps; a step gives PARTS
// vectors that go with one broadcast of OPERAND activations, whose columns lie side by side in the lanes.
#pragma once

#include "linear.h"

namespace qk {
namespace {

// A unit's values, decoded once for many tokens and then read as D decodes.
template <class D>
struct Panel {
    using Line = const float *;
    alignas(64) float values[128 * ROWS];

    Panel(const D &d, const uint8_t *codes, int lines) {
        float *to = values;
        for (int line = 0; line < lines; ++line) {
            const typename D::Line raw = d.load(codes, line);
QK_UNROLL(8)
            for (int step = 0; step < D::STEPS; ++step) {
                typename D::Vector value[D::PARTS];
                d.decode(raw, step, value);
                for (int p = 0; p < D::PARTS; ++p, to += D::LANES) D::store(to, value[p]);
            }
        }
    }
    Line load(const uint8_t *, int line) const { return values + line * D::STEPS * D::PARTS * D::LANES; }
    void decode(Line line, int step, typename D::Vector *value) const {
        for (int p = 0; p < D::PARTS; ++p) value[p] = D::load_floats(line + (step * D::PARTS + p) * D::LANES);
    }
};

// T tokens over a unit whose values a D or a Panel gives. CHAINS sums per output if few of them are in work: a product
// that waits for the one before wastes the time of eight.
template <class D, int T, class S>
QK_INLINE void table_product(const S &source, const Unit &u, const Activations &a, int lines, int i, int64_t row,
                             float *acc) {
    constexpr int WANTED = 8 / (T * D::PARTS), CHAINS = WANTED >= 4 && D::STEPS >= 4 ? 4 : WANTED >= 2 ? 2 : 1;
    const float *x[T];
    typename D::Vector sum[CHAINS][T][D::PARTS];
    for (int t = 0; t < T; ++t) {
        x[t] = reinterpret_cast<const float *>(a.at(row + t, i));
        for (int c = 0; c < CHAINS; ++c)
            for (int p = 0; p < D::PARTS; ++p) sum[c][t][p] = D::zero();
    }
    for (int line = 0; line < lines; ++line) {
        const auto raw = source.load(u.codes, line);
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
    const typename D::Scales scales(u);
    for (int t = 0; t < T; ++t) {
        for (int c = 1; c < CHAINS; ++c)
            for (int p = 0; p < D::PARTS; ++p) sum[0][t][p] = D::add(sum[0][t][p], sum[c][t][p]);
        D::scale_and_add(sum[0][t], scales, acc + t * ROWS);
    }
}

template <class D, int T, class S>
QK_APART void table_tokens(const S &source, const Unit &u, const Activations &a, int lines, int i, int64_t row,
                           float *acc) {
    table_product<D, T>(source, u, a, lines, i, row, acc);
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
